"""What makes the target answer: transformers' own generation, or vLLM.

An engine is a function of a shard's requests that gives each one's tokens, up to the first stop token, which is one of
them, or up to the limit.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple
from zlib import crc32

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from drafter.data.batches import by_budget
from drafter.models.loading import Model, ModelSource, load_generation_config

# Fields of a generation config that change nothing of what is drawn; the end of text is that of `end_of_turn_ids`.
NOT_SETTINGS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "transformers_version"}


class Request(NamedTuple):
    """One answer asked of the target; `split` is "train" or "validation", `repetition` counts from its first answer."""

    id: str
    kind: str
    split: str
    temperature: float
    prompt_ids: list[int]
    repetition: int = 0


Engine = Callable[[list[Request]], list[list[int]]]


class Limits(NamedTuple):
    """How answers are drawn, and where they end."""

    top_p: float
    max_new_tokens: int
    stop_ids: list[int]


def settings_left_out(model: Model) -> dict[str, Any]:
    """What a model's generation_config.json says of how it generates, which no engine here follows.

    A response is drawn from softmax(logits / temperature), cut by top-p, as evaluation and the losses assume.
    """
    config = load_generation_config(model)
    named = config.to_dict() if config else {}
    told = (name for name in named if name not in NOT_SETTINGS and not name.startswith("_"))
    return {name: named[name] for name in told if named[name]}


def transformers_engine(target: PreTrainedModel, limits: Limits, batch_tokens: int, first_round: int = 16) -> Engine:
    """Batched generation in rounds of 16, 32, 64 … tokens, `batch_tokens` a batch at the most, padding included.

    A batch runs until its longest answer ends, and most answers are short: after each round the unfinished ones are
    gathered into new, full batches, which costs reading their text again. Its random numbers are torch's.
    """

    def answer(requests: list[Request]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in requests]
        pending, round_ = list(range(len(requests))), first_round
        while pending:
            room = min(round_, limits.max_new_tokens - len(answers[pending[0]]))  # all pending ones are equally long
            for temperature in sorted({requests[i].temperature for i in pending}):
                alike = [i for i in pending if requests[i].temperature == temperature]
                lengths = [len(requests[i].prompt_ids) + len(answers[i]) + room for i in alike]
                for batch in by_budget(lengths, batch_tokens):
                    contexts = [requests[alike[b]].prompt_ids + answers[alike[b]] for b in batch]
                    for b, tokens in zip(batch, _generate(target, contexts, temperature, room, limits), strict=True):
                        answers[alike[b]] += tokens
            pending = [
                i for i in pending if answers[i][-1] not in limits.stop_ids and len(answers[i]) < limits.max_new_tokens
            ]
            round_ *= 2
        return answers

    return answer


class _Finite(LogitsProcessor):
    """Refuses logits that are not finite, of which sampling would make anything."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise ValueError(
                f"the target's logits are not finite after {input_ids.shape[1]} tokens: try target.dtype=float32, and "
                f"see that its weights are whole"
            )
        return scores


@contextmanager
def _neutral_config(model: PreTrainedModel) -> Iterator[None]:
    """Put the model's generation config aside: `generate` takes from it every field that its own config leaves open."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.inference_mode()
def _generate(
    target: PreTrainedModel, contexts: list[list[int]], temperature: float, max_new_tokens: int, limits: Limits
) -> list[list[int]]:
    """What follows each context, up to its first stop token (which is part of it)."""
    width, stops = max(map(len, contexts)), limits.stop_ids
    padding = stops[0] if stops else 0
    ids = torch.tensor([[padding] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    sampled: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": limits.top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampled if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=padding,
    )
    device, plain_generate = target.device, GenerationMixin.generate  # a checkpoint may bring a `generate` of its own
    with _neutral_config(target):
        output = plain_generate(
            target,
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Finite()]),
        )
    grown = output[:, width:].tolist()
    return [tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), None)] for tokens in grown]


def references_engine(tokens: dict[str, list[int]]) -> Engine:
    """Answers that the data has: id of an instruction -> tokens."""
    return lambda requests: [tokens[request.id] for request in requests]


def mixed_engine(engines: list[Engine]) -> Engine:
    """Engines that answer in equal shares; which one answers an instruction depends on its id alone."""

    def answer(requests: list[Request]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in requests]
        for number, engine in enumerate(engines):
            mine = [i for i, request in enumerate(requests) if crc32(request.id.encode()) % len(engines) == number]
            for i, tokens in zip(mine, engine([requests[i] for i in mine]) if mine else [], strict=True):
                answers[i] = tokens
        return answers

    return answer


def vllm_engine(target: ModelSource, limits: Limits, seed: int, **options: Any) -> Engine:
    """vLLM's offline engine; under torchrun each rank has one of its own, on its own GPU.

    A request's random numbers depend on the seed and the request alone. `options` are vllm.LLM's, such as
    tensor_parallel_size (without torchrun), gpu_memory_utilization, max_model_len.

    What the checkpoint's generation_config.json says is left out by generation_config="vllm"
    (https://docs.vllm.ai/en/stable/configuration/engine_args/#-generation-config), which still adds that file's ends of
    text and the tokenizer's to a request's: ignore_eos leaves the ends of `limits` alone.

    Raises:
        ImportError: vLLM is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _show_own_gpu()
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

    def answer(requests: list[Request]) -> list[list[int]]:
        how = [SamplingParams(**_vllm_sampling(request, limits, seed)) for request in requests]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = llm.generate(prompts, how, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer


def _show_own_gpu() -> None:
    """Hide the other ranks' GPUs from this process."""
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)


def _vllm_sampling(request: Request, limits: Limits, seed: int) -> dict[str, Any]:
    """The arguments of vllm.SamplingParams for a request."""
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
    """63 bits of its own for each request of a run, whatever its shard, its rank and its neighbours."""
    key = repr((seed, request.id, request.temperature, request.repetition))
    return int.from_bytes(sha256(key.encode()).digest()[:8]) >> 1
