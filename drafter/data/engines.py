"""Generate responses with the target, in this process or by vLLM.

An engine is a function from a list of requests to a list of responses. The tokens of a response end with its first stop
token, or at the limit.
"""

import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple
from zlib import crc32

import torch
from transformers import PreTrainedModel

from drafter.data.padded import batches_of, generate_padded
from drafter.decoding import side_by_side
from drafter.decoding.capabilities import check_side_by_side
from drafter.decoding.side_by_side import Generated
from drafter.models.loading import load_generation_config
from drafter.models.packing import pack
from drafter.models.source import Model, ModelSource

# Fields of a generation config that do not affect sampling. `end_of_turn_ids` decides where a response ends.
NEUTRAL_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "transformers_version"}


class Request(NamedTuple):
    """A response to be generated.

    Attributes:
        id: the instruction's.
        kind: the instruction's.
        split: "train" or "validation".
        temperature: of the sampling; 0 is greedy.
        prompt_ids: the tokens that the response follows.
        repetition: the number of earlier requests for the same instruction.
        dialogue: the conversation, if it has more turns (see dialogues.Dialogue).
        turn: the number of earlier turns that were answered.
    """

    id: str
    kind: str
    split: str
    temperature: float
    prompt_ids: list[int]
    repetition: int = 0
    dialogue: Any = None
    turn: int = 0


class Failure(NamedTuple):
    """Stands in the place of a response that could not be had. The reason is counted."""

    reason: str


Engine = Callable[[list[Request]], Sequence[list[int] | Failure]]


class Limits(NamedTuple):
    """How responses are sampled, and where they end."""

    top_p: float
    max_new_tokens: int
    stop_ids: list[int]


def ignored_settings(model: Model) -> dict[str, Any]:
    """Return the settings of a model's generation_config.json that no engine applies.

    A response is drawn from softmax(logits / temperature) with top-p, as evaluation and the losses assume.
    """
    config = load_generation_config(model)
    fields = config.to_dict() if config else {}
    settings = (name for name in fields if name not in NEUTRAL_FIELDS and not name.startswith("_"))
    return {name: fields[name] for name in settings if fields[name]}


def transformers_engine(target: PreTrainedModel, limits: Limits, batch_tokens: int) -> Engine:
    """Return an engine that generates side by side, or in rounds if the target does not support the former.

    `decoding.side_by_side` keeps a batch full by giving the row of a finished response to the next prompt. Some
    architectures have states, do not accept the masks that this takes, or have a sliding window shorter than the
    sequences (see `capabilities.check_side_by_side`); for these there is `rounds_engine`. Random numbers come from
    torch's global generator. Padding counts towards `batch_tokens`. On a CPU, the weights of the target are packed (see
    `models.packing`).
    """
    in_rounds = rounds_engine(pack(target), limits, batch_tokens)

    def generate(requests: list[Request]) -> Sequence[list[int] | Failure]:
        found = generate_side_by_side(target, requests, limits, batch_tokens)
        return in_rounds(requests) if found is None else [one.tokens for one in found]

    return generate


def generate_side_by_side(
    target: PreTrainedModel,
    requests: list[Request],
    limits: Limits,
    batch_tokens: int,
    states: torch.dtype | None = None,
) -> list[Generated] | None:
    """Return responses generated side by side, and their states if `states` is given; None if the target cannot."""
    longest = max((len(request.prompt_ids) for request in requests), default=0) + limits.max_new_tokens
    try:
        check_side_by_side(target, longest)
    except ValueError:
        return None
    return side_by_side.generate(
        target,
        [request.prompt_ids for request in requests],
        [request.temperature for request in requests],
        top_p=limits.top_p,
        max_new_tokens=limits.max_new_tokens,
        stop_ids=set(limits.stop_ids),
        batch_tokens=batch_tokens,
        states=states,
    )


def rounds_engine(target: PreTrainedModel, limits: Limits, batch_tokens: int, first_round: int = 16) -> Engine:
    """Return an engine that generates with transformers, in rounds of 16, 32, 64 … tokens.

    A batch runs until its longest response ends, and most responses are short. After each round, the unfinished ones
    are gathered into new, full batches, at the cost of another forward pass over their tokens. If the target does not
    support padding, or batches, they have prompts of one length, or one prompt (see `padded.way_of`).
    """

    def generate(requests: list[Request]) -> list[list[int]]:
        responses: list[list[int]] = [[] for _ in requests]
        pending, round_ = list(range(len(requests))), first_round
        while pending:
            # All pending responses are equally long.
            limit = min(round_, limits.max_new_tokens - len(responses[pending[0]]))
            for temperature in sorted({requests[i].temperature for i in pending}):
                alike = [i for i in pending if requests[i].temperature == temperature]
                lengths = [len(requests[i].prompt_ids) + len(responses[i]) + limit for i in alike]
                for batch in batches_of(target, lengths, batch_tokens):
                    contexts = [requests[alike[b]].prompt_ids + responses[alike[b]] for b in batch]
                    found = generate_padded(target, contexts, temperature, limit, limits.top_p, limits.stop_ids)
                    for b, tokens in zip(batch, found, strict=True):
                        responses[alike[b]] += tokens
            unfinished = (i for i in pending if responses[i][-1] not in limits.stop_ids)
            pending = [i for i in unfinished if len(responses[i]) < limits.max_new_tokens]
            round_ *= 2
        return responses

    return generate


def references_engine(tokens: dict[str, list[int]]) -> Engine:
    """Return an engine that looks up the reference answer of the data by the id of the instruction."""
    return lambda requests: [tokens[request.id] for request in requests]


def mixed_engine(engines: list[Engine]) -> Engine:
    """Return an engine that divides the requests evenly over several engines, by the id of the instruction alone."""

    def generate(requests: list[Request]) -> list[list[int] | Failure]:
        responses: list[list[int] | Failure] = [[] for _ in requests]
        for number, engine in enumerate(engines):
            share = [i for i, request in enumerate(requests) if crc32(request.id.encode()) % len(engines) == number]
            for i, tokens in zip(share, engine([requests[i] for i in share]) if share else [], strict=True):
                responses[i] = tokens
        return responses

    return generate


def vllm_engine(target: ModelSource, limits: Limits, seed: int, **options: Any) -> Engine:
    """Return an engine that generates with vLLM, offline. Under torchrun each rank has an engine on its own GPU.

    The random numbers of a request depend only on the seed and the request.

    generation_config="vllm" ignores the checkpoint's generation_config.json
    (https://docs.vllm.ai/en/stable/configuration/engine_args/#-generation-config), except that vLLM still adds the ends
    of text from that file and from the tokenizer. With ignore_eos, only the stop tokens of `limits` end a response.

    Args:
        target: where the target is and how it is loaded.
        limits: how responses are sampled, and where they end.
        seed: the seed of the run.
        options: arguments of vllm.LLM such as tensor_parallel_size (without torchrun) or gpu_memory_utilization.

    Raises:
        ImportError: vLLM is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _select_gpu()
    try:
        from vllm import LLM, SamplingParams
    except ImportError as problem:
        raise ImportError(
            "respond.engine=vllm needs vLLM: `pip install -e '.[vllm]'`, or use respond.engine=transformers"
        ) from problem
    llm = LLM(
        model=target.path,
        tokenizer=target.path,
        revision=target.revision,
        tokenizer_revision=target.revision,
        dtype=target.dtype,
        trust_remote_code=target.trust_remote_code,
        seed=seed,
        generation_config="vllm",
        **options,
    )

    def generate(requests: list[Request]) -> list[list[int]]:
        sampling = [SamplingParams(**_vllm_sampling(request, limits, seed)) for request in requests]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def _select_gpu() -> None:
    """Hide the GPUs of the other ranks from this process."""
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)


def _vllm_sampling(request: Request, limits: Limits, seed: int) -> dict[str, Any]:
    """Return the arguments of vllm.SamplingParams for a request."""
    return {
        "temperature": request.temperature,
        "top_p": limits.top_p if request.temperature > 0 else 1.0,
        "top_k": -1,
        "max_tokens": limits.max_new_tokens,
        "stop_token_ids": limits.stop_ids,
        "ignore_eos": True,
        "seed": request_seed(seed, request),
        "detokenize": False,
    }


def request_seed(seed: int, request: Request) -> int:
    """Return a seed of 63 bits for a request, which does not depend on its shard, its rank or the other requests."""
    turn = (request.turn,) if request.turn else ()
    return hashed_seed(seed, request.id, request.temperature, request.repetition, *turn)


def hashed_seed(*parts: Any) -> int:
    """Return a seed of 63 bits that is determined by the parts."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8]) >> 1
