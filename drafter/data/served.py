"""Generate responses with a target that an OpenAI-compatible server serves.

The prompt is sent as token ids, so that the target reads the encoding of this project and no second template. The
response is taken as token ids where the server gives them. From any other server the text is encoded again, and used
only if it comes back from its ids and has as many tokens as the server counted.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from drafter.data.completions import Answer, Server, ask
from drafter.data.engines import Engine, Failure, Limits, Request, request_seed
from drafter.data.http_client import HttpClient, Refused, ServerError, UnreadableAnswer

log = logging.getLogger(__name__)
SEEDS = 2**31 - 1  # seeds are below this number: llama-server's are 32 bits wide, and the largest means "random"
PROBE_TOKENS = 16
KEY_HINT = ". The key comes from the environment variable that respond.openai.api_key_variable names"
HINTS = {404: ". The address usually ends with /v1", 401: KEY_HINT, 403: KEY_HINT}
TEXT_DIFFERS = "a text that does not come back under the target's tokenizer"
PROMPT_DIFFERS = "a prompt that the server reads as other tokens"
OTHER_END = "ended by the server at a token that does not end the target's turn"


def served_engine(
    client: HttpClient,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    seed: int,
    probe_ids: list[int],
    concurrency: int = 8,
) -> Engine:
    """Check the server, and return an engine that asks it, with several requests at a time.

    The seed of a request depends only on the seed of the run and on the request.

    Args:
        client: asks the server.
        model: the name under which the server has the target.
        tokenizer: the target's.
        limits: how responses are sampled, and where they end.
        seed: the seed of the run.
        probe_ids: a prompt of the target for the check, in its chat template.
        concurrency: how many requests are under way at the same time.

    Raises:
        ServerError: the server cannot be used; says why.
    """
    try:
        server = check_server(client, model, tokenizer, limits, probe_ids)
    finally:
        client.close()

    def respond(request: Request) -> list[int] | Failure:
        prompt: list[int] | str = request.prompt_ids
        if server.text_prompts:
            prompt = _decode(tokenizer, request.prompt_ids)
            if _encode(tokenizer, prompt) != request.prompt_ids:
                return Failure(PROMPT_DIFFERS)
        sampling = limits if request.temperature > 0 else limits._replace(top_p=1.0)
        answer = ask(client, server, prompt, request.temperature, sampling, request_seed(seed, request) % SEEDS)
        return response_ids(answer, request, tokenizer, limits)

    def generate(requests: list[Request]) -> list[list[int] | Failure]:
        pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="served")
        try:
            return [future.result() for future in [pool.submit(respond, request) for request in requests]]
        except BaseException:
            client.cancel()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            client.close()

    return generate


def response_ids(
    answer: Answer, request: Request, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[int] | Failure:
    """Return the ids of a response, with the stop token that ended it; or the reason why it is left out."""
    if answer.prompt_tokens != len(request.prompt_ids):
        return Failure(PROMPT_DIFFERS)
    ids = answer.ids
    if ids is None:
        ids = encoded_response(answer, request.prompt_ids, tokenizer)
        if ids is None:
            return Failure(TEXT_DIFFERS)
    first = next((i for i, token in enumerate(ids) if token in limits.stop_ids), None)
    if first is not None:
        return ids[: min(first + 1, limits.max_new_tokens)]
    if answer.ended:
        omitted = answer.ids is None or answer.completion_tokens == len(ids) + 1
        end = next(iter(limits.stop_ids), None) if answer.end_id is None else answer.end_id
        if not omitted or end not in limits.stop_ids:
            return Failure(OTHER_END)
        ids = [*ids, end]
    return ids[: limits.max_new_tokens]


def encoded_response(answer: Answer, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the ids of a response's text, or None if they are not certain to be those that were generated.

    The ids must decode to the text, after the prompt or alone, and be as many as the server counted, with or without
    the stop token. SentencePiece tokenizers put a space before a text, so that a first space is also tried without.
    """
    counts = {answer.completion_tokens, answer.completion_tokens - answer.ended}
    before = _decode(tokenizer, prompt_ids)
    for text in dict.fromkeys((answer.text, answer.text.removeprefix(" "))):
        ids = _encode(tokenizer, text)
        if len(ids) in counts and answer.text in (_decode(tokenizer, ids), _after(tokenizer, prompt_ids, ids, before)):
            return ids
    return None


def check_server(
    client: HttpClient, model: str, tokenizer: PreTrainedTokenizerBase, limits: Limits, probe_ids: list[int]
) -> Server:
    """Find out what the server is, and refuse it if it would read prompts, or write responses, in other tokens.

    Raises:
        ServerError: the server does not have the model, does not take the prompt as it is, or has another tokenizer.
    """
    server = _find_model(client, model)
    short = Limits(1.0, min(PROBE_TOKENS, limits.max_new_tokens), limits.stop_ids)
    try:
        answer = ask(client, server, probe_ids, 0.0, short, 0)
    except Refused as refusal:
        if server.native or refusal.status not in (400, 422):
            raise
        server = server._replace(text_prompts=True)
        try:
            answer = ask(client, server, _decode(tokenizer, probe_ids), 0.0, short, 0)
        except Refused:
            raise refusal from None
    sent, come = ("text" if as_text else "token ids" for as_text in (server.text_prompts, answer.ids is None))
    if answer.prompt_tokens != len(probe_ids):
        raise ServerError(
            f"{client.url} reads a prompt of {len(probe_ids)} tokens, sent as {sent}, as {answer.prompt_tokens}: it "
            f"adds a token or a template of its own, or has another tokenizer than the target. Serve {model} with "
            f"llama-server or vLLM, which take the prompt as it is"
        )
    if answer.ids is not None:
        check_vocabulary(client.url, tokenizer, answer.ids, answer.text, limits.stop_ids)
    elif encoded_response(answer, probe_ids, tokenizer) is None:
        log.warning("%s: %r is %s: such responses are left out", client.url, answer.text, TEXT_DIFFERS)
    log.info("%s serves %s: prompts are sent as %s, responses come as %s", client.url, server.model, sent, come)
    return server


def _find_model(client: HttpClient, model: str) -> Server:
    """Return the server with the name of the model. Refuse it if it lists models, and the model is not among them."""

    def read(found: Any) -> list[dict[str, Any]]:
        rows = found.get("data") if isinstance(found, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
            raise UnreadableAnswer(f"no list of models: {str(found)[:200]}")
        return rows

    try:
        rows = client.ask("/models", None, read)
    except Refused as refusal:
        raise Refused(f"{refusal}{HINTS.get(refusal.status, '')}", refusal.status) from None
    names = [row["id"] for row in rows]
    if model not in names:
        raise ServerError(f"{client.url} serves {', '.join(names) or 'nothing'}, not {model}: set respond.openai.model")
    return Server(model, native=rows[names.index(model)].get("owned_by") == "llamacpp")


def check_vocabulary(
    url: str, tokenizer: PreTrainedTokenizerBase, tokens: list[int], text: str, stop_ids: list[int]
) -> None:
    """Refuse a server whose ids have other texts than the target's.

    Args:
        url: the server's address.
        tokenizer: the target's.
        tokens: the ids of an answer.
        text: the same answer as the server decodes it.
        stop_ids: the ids that end an answer, and that the text may lack.

    Raises:
        ServerError: names both texts.
    """
    ids = [token for token in tokens if token not in stop_ids]
    texts = {tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)}
    if text.strip().rstrip("\ufffd") not in {one.strip().rstrip("\ufffd") for one in texts}:
        raise ServerError(
            f"{url} writes {text!r} for ids that the target's tokenizer decodes to {sorted(texts)[0]!r}: "
            f"it serves a model with another tokenizer than target.path"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _after(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int], before: str) -> str | None:
    """Return the text of ids after a prompt, or None if they change the prompt's text."""
    whole = _decode(tokenizer, [*prompt_ids, *ids])
    return whole[len(before) :] if whole.startswith(before) else None
