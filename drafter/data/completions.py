"""Ask an OpenAI-compatible server for completions, with every sampling field set.

The defaults of the servers (a top-k of 40 and a min-p of 0.05 in llama-server, a checkpoint's generation_config.json in
vLLM) sample from another distribution than the target's, so that no field is left to them. llama-server is asked at its
own /completion, which returns token ids; the others at /v1/completions, where vLLM returns them for `return_token_ids`.
"""

from typing import Any, NamedTuple

from drafter.data.engines import Limits
from drafter.data.http_client import HttpClient, ServerError, UnreadableAnswer


class Server(NamedTuple):
    """What a server is, as its check found.

    Args:
        model: the name of the model, as the server reports it.
        native: llama-server, which is asked at its own /completion.
        text_prompts: the server takes no ids, so that the prompt is sent as text.
    """

    model: str
    native: bool = False
    text_prompts: bool = False


class Answer(NamedTuple):
    """A completion. `ids` is None if the server gave text alone; `end_id` is the stop token, if the server names it."""

    text: str
    ids: list[int] | None
    ended: bool
    end_id: int | None
    prompt_tokens: int
    completion_tokens: int
    context_full: bool = False


def ask(
    client: HttpClient, server: Server, prompt: list[int] | str, temperature: float, limits: Limits, seed: int
) -> Answer:
    """Ask for one completion.

    Raises:
        ServerError: the server refused, failed for too long, or its context is too short.
    """

    def read(found: Any) -> Answer:
        answer = read_native(found) if server.native else read_completion(found)
        counted = answer.completion_tokens, answer.completion_tokens - answer.ended  # the stop token may be omitted
        if answer.ids is not None and len(answer.ids) not in counted:
            raise UnreadableAnswer(f"{len(answer.ids)} token ids, where it counts {answer.completion_tokens} tokens")
        short = not answer.ended and answer.completion_tokens < limits.max_new_tokens
        if short and not answer.context_full:
            raise UnreadableAnswer(f"cut off after {answer.completion_tokens} of {limits.max_new_tokens} tokens")
        return answer._replace(context_full=short)

    fields = native_fields if server.native else completion_fields
    body = {"model": server.model, "prompt": prompt, **fields(temperature, limits, seed)}
    answer = client.ask("//completion" if server.native else "/completions", body, read)
    if answer.context_full:
        raise ServerError(
            f"{client.url} ran out of context after a prompt of {len(prompt)} tokens and {answer.completion_tokens} of "
            f"{limits.max_new_tokens} new ones: start it with more context per request, or lower respond.max_new_tokens"
        )
    return answer


def completion_fields(temperature: float, limits: Limits, seed: int) -> dict[str, Any]:
    """Return the fields of /v1/completions. Servers ignore those that they do not know.

    `ignore_eos` is not among them: SGLang would then ignore the stop tokens too. Special tokens stay in the text,
    because without them a text that lacks some would come back from its ids all the same.
    """
    return {
        "max_tokens": limits.max_new_tokens,
        "temperature": temperature,
        "top_p": limits.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,  # vLLM and SGLang
        "repeat_penalty": 1.0,  # LM Studio
        "seed": seed,
        "n": 1,
        "stream": False,
        "stop_token_ids": limits.stop_ids,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
    }


def native_fields(temperature: float, limits: Limits, seed: int) -> dict[str, Any]:
    """Return the fields of llama-server's own /completion.

    Its samplers are applied in the order given: by default, top-p comes before the temperature. A cached prompt is
    computed in batches of another size, which decides near ties of the argmax otherwise.
    """
    return {
        "n_predict": limits.max_new_tokens,
        "samplers": ["temperature", "top_p"],
        "temperature": temperature,
        "top_p": limits.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "dynatemp_range": 0.0,
        "xtc_probability": 0.0,
        "mirostat": 0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "dry_multiplier": 0.0,
        "seed": seed,
        "n_probs": 0,
        "stream": False,
        "cache_prompt": False,
        "return_tokens": True,
    }


def read_completion(found: Any) -> Answer:
    """Read an answer of /v1/completions.

    Raises:
        UnreadableAnswer: something is missing.
        ServerError: the server is Ollama, which changes the prompt and the distribution.
    """
    if isinstance(found, dict) and found.get("system_fingerprint") == "fp_ollama":
        raise ServerError(
            "Ollama's /v1/completions wraps every prompt in a template, and has a top-k and a repetition penalty that "
            "no request can switch off: serve its GGUF file with llama-server"
        )
    try:
        choice, usage = found["choices"][0], found["usage"]
        ids, reason = choice.get("token_ids"), choice["finish_reason"]
        end = next(
            (choice[name] for name in ("matched_stop", "stop_reason") if isinstance(choice.get(name), int)), None
        )
        counts = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        text = choice["text"]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as problem:
        raise UnreadableAnswer(f"{type(problem).__name__}: {problem} in {str(found)[:200]}") from None
    if reason not in ("stop", "length") or not isinstance(text, str):
        raise UnreadableAnswer(f"finish_reason {reason!r} and a text of {type(text).__name__}")
    return Answer(text, None if ids is None else list(ids), reason == "stop", end, *counts)


def read_native(found: Any) -> Answer:
    """Read an answer of llama-server's /completion.

    Raises:
        UnreadableAnswer: something is missing.
    """
    try:
        text, ids, reason = found["content"], list(found["tokens"]), found["stop_type"]
        counts = int(found["tokens_evaluated"]), int(found["tokens_predicted"])
        full = bool(found.get("truncated"))
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise UnreadableAnswer(f"{type(problem).__name__}: {problem} in {str(found)[:200]}") from None
    if reason not in ("eos", "limit"):
        raise UnreadableAnswer(f"stop_type {reason!r}")
    return Answer(text, ids, reason == "eos", None, *counts, context_full=full and reason == "limit")
