"""Ask llama-server, vLLM or SGLang for a greedy completion, and read what the engine itself counts about it.

All three get the prompt as token ids. The first token of a text comes from the call that reads the prompt; target calls
are those that follow. Where each count comes from:

- llama-server: the `timings` of its /completion (server_slot_stats in tools/server/server-common.cpp). A request cannot
  switch drafting off: the fields `speculative.*` are disabled in tools/server/server-schema.cpp.
- vLLM: the difference of its Prometheus counters before and after the request (vllm/v1/spec_decode/metrics.py and
  vllm/v1/metrics/loggers.py). They are those of the whole server.
- SGLang: the `meta_info` of its /generate (python/sglang/srt/managers/tokenizer_manager.py).
"""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from drafter.data.completions import completion_fields, read_completion
from drafter.data.engines import Limits
from drafter.data.http_client import HttpClient, Refused, ServerError, UnreadableAnswer
from drafter.metrics import Counts

# The names of the same two counts in versions of SGLang, the newest first: drafted and accepted tokens.
SGLANG_DRAFTS = (
    ("spec_num_proposed_drafts", "spec_num_correct_drafts"),
    ("spec_proposed_drafts", "spec_accepted_drafts"),
    ("spec_draft_token_num", "spec_accept_token_num"),
)


class Answer(NamedTuple):
    """An engine's answer to one request.

    Attributes:
        tokens: the text's ids as the engine returns them.
        generated: the number of generated tokens, with one that ends the text.
        seconds: wall-clock time of the complete request.
        decoding_seconds: the part of it after the first token.
        target_calls: calls of the target after the one that yields the first token.
        drafted: drafted tokens.
        accepted: those of them that were accepted, as the engine counts them.
        text: the text as the engine decodes it, if it was asked for.
    """

    tokens: list[int]
    generated: int
    seconds: float
    decoding_seconds: float
    target_calls: int
    drafted: int = 0
    accepted: int = 0
    text: str = ""


def decoding_counts(drafted: Answer, alone: Answer | None) -> Counts:
    """Return the counts after the first token of an answer with a drafter, and of the same prompt's answer without.

    Only the token rate needs the answer without a drafter. It is NaN if there is none.
    """
    tokens, calls, seconds = drafted.generated - 1, drafted.target_calls, drafted.decoding_seconds
    baseline = (alone.generated - 1, alone.decoding_seconds) if alone else (0, float("nan"))
    return Counts(tokens, calls, drafted.accepted, 0, seconds, *baseline, drafted=drafted.drafted)


def ask_llama_server(
    client: HttpClient, prompt: list[int], limits: Limits, gamma: int, temperature: float = 0.0, seed: int = 0
) -> Answer:
    """Return llama-server's continuation of a prompt, and its counts with a drafter of γ tokens per block.

    The server decides itself which tokens end a text. Above temperature 0 it samples from the complete distribution:
    its own top-k, top-p and min-p are switched off.

    Raises:
        ServerError: see `llama_answer`; or the context was too short.
    """
    body = {"prompt": prompt, "n_predict": limits.max_new_tokens, "temperature": temperature, "ignore_eos": False}
    body |= {"cache_prompt": False, "return_tokens": True}
    body |= {"samplers": ["temperature"], "seed": seed} if temperature else {"top_k": 1, "samplers": ["top_k"]}
    began = time.perf_counter()
    found = client.ask("//completion", body, _with_timings)
    if found.get("truncated"):
        raise ServerError(f"{client.url} ran out of context: start it with more, or lower the length of an answer")
    return llama_answer(found, time.perf_counter() - began, gamma, limits.max_new_tokens, len(prompt))


def _with_timings(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or "timings" not in found or not found.get("tokens"):
        raise UnreadableAnswer("an answer of /completion without timings or tokens: take a newer llama-server")
    return found


def llama_answer(found: dict[str, Any], seconds: float, gamma: int, length: int, prompt: int) -> Answer:
    """Return what an answer of llama-server's /completion says.

    It counts drafts, not calls. In a text of the full length, each call brought one token that was not drafted. A text
    that ended by itself may end within its last block; all of its blocks have γ drafts, except those that begin at most
    γ tokens before the full length, which such a text rarely reaches. A draft that ends the text is not counted as
    accepted.

    Args:
        found: the answer's JSON.
        seconds: the request's time.
        gamma: drafted tokens per block; 0 without a drafter, or if it is not known yet.
        length: the most tokens of the text.
        prompt: the prompt's number of tokens.

    Raises:
        ServerError: it kept a part of the prompt from an earlier request, or drafted nothing.
    """
    timings = found["timings"]
    generated, drafted = timings["predicted_n"], timings.get("draft_n", 0)
    if timings["prompt_n"] != prompt:
        raise ServerError(f"llama-server read {timings['prompt_n']} of {prompt} prompt tokens: it kept the others")
    if gamma and generated > 2 and not drafted:
        raise ServerError(f"llama-server drafted nothing in a text of {generated} tokens: its log says why")
    accepted = timings.get("draft_n_accepted", 0)
    whole = generated == length or not gamma
    calls = generated - 1 - accepted if whole else -(-drafted // gamma)
    decoding, text = timings["predicted_ms"] / 1000, found.get("content", "")
    return Answer(found["tokens"], generated, seconds, decoding, calls, drafted, accepted, text)


def ask_vllm(client: HttpClient, prompt: list[int], limits: Limits, gamma: int) -> Answer:
    """Return vLLM's greedy continuation of a prompt, with the change of its counters; γ is not needed.

    A target call without drafts is not among vLLM's counters, and a draft after the text's end counts as accepted.

    Raises:
        ServerError: the server counted more tokens than it returned, because somebody else uses it too.
    """
    before = client.ask("//metrics", None, read_vllm_counters, as_text=True)
    body = {"prompt": prompt, **completion_fields(0.0, limits, seed=0)}
    began = time.perf_counter()
    answer = client.ask("//v1/completions", body, read_completion)
    seconds = time.perf_counter() - began
    if answer.ids is None:
        raise ServerError(f"{client.url} returned no token ids: measure.engine=vllm needs a vLLM with return_token_ids")
    if answer.prompt_tokens != len(prompt):
        raise ServerError(f"{client.url} read {answer.prompt_tokens} prompt tokens where {len(prompt)} were sent")

    def changes(text: str) -> VllmCounters:
        after = read_vllm_counters(text)
        found = VllmCounters(*(new - old for new, old in zip(after, before, strict=True)))
        if found.generated < answer.completion_tokens:
            raise UnreadableAnswer(f"counters with {found.generated:.0f} of {answer.completion_tokens} new tokens")
        return found

    found = client.ask("//metrics", None, changes, as_text=True)
    if found.generated > answer.completion_tokens:
        raise ServerError(
            f"{client.url} generated {found.generated:.0f} tokens during an answer of {answer.completion_tokens}: its "
            f"counters are those of all requests, so that nobody else may use it meanwhile"
        )
    drafts = int(found.drafts), int(found.draft_tokens), int(found.accepted_tokens)
    if not drafts[0]:
        drafts = answer.completion_tokens - 1, 0, 0
    return Answer(answer.ids, answer.completion_tokens, seconds, found.decode_seconds, *drafts, answer.text)


class VllmCounters(NamedTuple):
    """Counters of a vLLM server since its start, summed over its engines; those of drafts are 0 if it has none.

    Attributes:
        generated: vllm:generation_tokens.
        decode_seconds: the sum of vllm:request_decode_time_seconds, from a request's first token to its last.
        drafts: vllm:spec_decode_num_drafts, the target calls with drafts.
        draft_tokens: vllm:spec_decode_num_draft_tokens.
        accepted_tokens: vllm:spec_decode_num_accepted_tokens.
    """

    generated: float
    decode_seconds: float
    drafts: float
    draft_tokens: float
    accepted_tokens: float


def read_vllm_counters(text: str) -> VllmCounters:
    """Read an answer of vLLM's /metrics.

    Raises:
        UnreadableAnswer: it has no counter of generated tokens or of decoding's time.
    """
    found: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)", text, re.MULTILINE):
        name = name.removesuffix("_total")  # which Prometheus appends to the names of counters
        found[name] = found.get(name, 0.0) + float(value)
    try:
        needed = found["generation_tokens"], found["request_decode_time_seconds_sum"]
    except KeyError as problem:
        raise UnreadableAnswer(f"no counter vllm:{problem.args[0]} in /metrics") from None
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return VllmCounters(*needed, *(found.get(f"spec_decode_{name}", 0.0) for name in names))


def ask_sglang(client: HttpClient, prompt: list[int], limits: Limits, gamma: int) -> Answer:
    """Return SGLang's greedy continuation of a prompt, with the counts of its `meta_info`; γ is not needed.

    SGLang reports the time of a complete request alone, so that `decoding_seconds` has the reading of the prompt too.

    Raises:
        ServerError: the server read another number of prompt tokens.
    """
    sampling = {"temperature": 0.0, "max_new_tokens": limits.max_new_tokens, "stop_token_ids": limits.stop_ids}
    sampling |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    began = time.perf_counter()
    found = client.ask("//generate", {"input_ids": prompt, "sampling_params": sampling}, read_sglang)
    if (read := found["meta_info"]["prompt_tokens"]) != len(prompt):
        raise ServerError(f"{client.url} read {read} prompt tokens where {len(prompt)} were sent")
    return sglang_answer(found, time.perf_counter() - began)


def read_sglang(found: Any) -> dict[str, Any]:
    """Return an answer of SGLang's /generate.

    Raises:
        UnreadableAnswer: something is missing.
    """
    meta = found.get("meta_info") if isinstance(found, dict) else None
    needed = {"prompt_tokens", "completion_tokens", "e2e_latency"}
    if not isinstance(meta, dict) or not needed <= meta.keys() or not {"text", "output_ids"} <= found.keys():
        raise UnreadableAnswer(f"no output_ids, or no meta_info with {', '.join(sorted(needed))}")
    if meta.get("spec_verify_ct") and not any(drafted in meta for drafted, _ in SGLANG_DRAFTS):
        raise UnreadableAnswer(f"meta_info without {SGLANG_DRAFTS[0][0]}: take a newer SGLang")
    return dict(found)


def sglang_answer(found: dict[str, Any], seconds: float) -> Answer:
    """Return what an answer of SGLang's /generate says. Without drafts each token but the first has a target call."""
    meta = found["meta_info"]
    generated, calls = meta["completion_tokens"], meta.get("spec_verify_ct", 0)
    counts = generated - 1, 0, 0
    if calls:
        drafted, accepted = next(names for names in SGLANG_DRAFTS if names[0] in meta)
        counts = calls, meta[drafted], meta[accepted]
    return Answer(found["output_ids"], generated, seconds, meta["e2e_latency"], *counts, found["text"])


ASK: dict[str, Callable[[HttpClient, list[int], Limits, int], Answer]] = {
    "llama-server": ask_llama_server,
    "vllm": ask_vllm,
    "sglang": ask_sglang,
}


def reported_gamma(engine: str, client: HttpClient, answer: Answer) -> int | None:
    """Return γ as a server reports it, or None if it does not.

    llama-server (started with --metrics) and vLLM have a counter of accepted drafts for each position of a block, and
    SGLang counts γ drafts for each target call.

    Args:
        engine: its name in ASK.
        client: asks the server.
        answer: an answer with drafts.
    """
    if engine == "sglang":
        gamma, rest = divmod(answer.drafted, answer.target_calls)
        return None if rest else gamma

    def read(text: str) -> int | None:
        positions = re.findall(r'spec_decode_num_accepted_tokens_per_pos(?:_total)?\{.*?position="(\d+)"', text)
        return max(map(int, positions)) + 1 if positions else None

    try:
        return client.ask("//metrics", None, read, as_text=True)
    except Refused:
        return None
