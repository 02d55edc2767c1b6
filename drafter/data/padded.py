"""Generate a batch of sequences with transformers' own `generate`, in the way that a model supports.

A batch of sequences of different lengths is padded on the left. Some models with states (RWKV, MiniMax) take the
padding for tokens, and RWKV mixes the sequences of a batch: both generate another text without an error. Each model is
therefore tried once, in the ways of `WAYS`.

Shapes: T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from drafter.data.batches import by_budget
from drafter.decoding.trials import ordinary_tokens, relative_error
from drafter.models.loading import context_length


class Way(NamedTuple):
    """How a model generates.

    Attributes:
        batches: several sequences at once.
        pads: these may have different lengths.
        caches: with a cache.
    """

    batches: bool
    pads: bool
    caches: bool


WAYS = (Way(True, True, True), Way(True, False, True), Way(False, False, True), Way(False, False, False))
# Model -> the first way that gives the text of a forward pass without a cache.
_WAYS: "WeakKeyDictionary[PreTrainedModel, Way]" = WeakKeyDictionary()
LENGTHS, NEW = (7, 3, 3), 3  # the tokens of the sequences of a trial, and of those that are generated after each


def way_of(model: PreTrainedModel) -> Way:
    """Return the fastest way in which a model generates what it does without a cache.

    Raises:
        ValueError: there is none; names the model.
    """
    if model not in _WAYS:
        exact = (way for way in WAYS if context_length(model) < max(LENGTHS) + NEW or _error(model, way) <= 1)
        way = next(exact, None)
        if way is None:
            raise ValueError(
                f"{type(model).__name__} does not generate the text of its own logits in transformers: let another "
                f"engine generate the responses (respond.engine)"
            )
        _WAYS[model] = way
    return _WAYS[model]


def batches_of(model: PreTrainedModel, lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of sequences in batches that the model supports, of at most `batch_tokens` with padding."""
    way = way_of(model)
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        groups.setdefault(0 if way.pads else lengths[index] if way.batches else index, []).append(index)
    for group in groups.values():
        for batch in by_budget([lengths[index] for index in group], batch_tokens):
            yield [group[place] for place in batch]


@torch.inference_mode()
def generate_padded(
    model: PreTrainedModel,
    contexts: Sequence[list[int]],
    temperature: float,
    max_new_tokens: int,
    top_p: float,
    stop_ids: list[int],
) -> list[list[int]]:
    """Return the tokens generated after each context, up to and including the first stop token.

    The contexts have to fit `way_of(model)` (see `batches_of`). Random numbers come from torch's global generator.

    Raises:
        ValueError: the model's logits are not finite.
    """
    sampled: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = {**(sampled if temperature > 0 else {"do_sample": False}), "eos_token_id": stop_ids or None}
    padding, width = stop_ids[0] if stop_ids else 0, max(map(len, contexts))
    # A single token is not told from a cached call by every model: RecurrentGemma goes on from the previous sequence.
    cached = way_of(model).caches and width > 1
    output = _generate(model, contexts, padding, max_new_tokens=max_new_tokens, use_cache=cached, **config)
    generated = output.sequences[:, width:].tolist()
    return [
        tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)] for tokens in generated
    ]


def _generate(model: PreTrainedModel, contexts: Sequence[list[int]], padding: int, **fields: Any) -> Any:
    width = max(map(len, contexts))
    ids = torch.tensor([[padding] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    plain_generate = GenerationMixin.generate  # the code of a checkpoint may override `generate`
    with _neutral_config(model):
        return plain_generate(
            model,
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(pad_token_id=padding, return_dict_in_generate=True, **fields),
            logits_processor=LogitsProcessorList([_RequireFinite()]),
        )


class _RequireFinite(LogitsProcessor):
    """Refuse logits that are not finite, from which any token could be sampled."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise ValueError(
                f"the target's logits are not finite after {input_ids.shape[1]} tokens: try target.dtype=float32, and "
                f"check that its weights are complete"
            )
        return scores


@contextmanager
def _neutral_config(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's generation config aside, because `generate` fills every field that is None from it."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.inference_mode()
def _error(model: PreTrainedModel, way: Way) -> float:
    """Return how far the logits of generated tokens are from those without a cache: wrong ones are above 1."""
    training = model.training
    model.eval()
    tokens = ordinary_tokens(model, 2 * max(LENGTHS))
    contexts = [tokens[start : start + length] for start, length in enumerate(LENGTHS)]
    first, *others = contexts
    batches = [contexts] if way.pads else [[first], others] if way.batches else [[one] for one in contexts]
    fields = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "use_cache": way.caches}
    outputs = [_generate(model, batch, tokens[-1], **fields) for batch in batches]
    generated = [row for output in outputs for row in output.sequences[:, -NEW:].tolist()]
    found = [row for output in outputs for row in torch.stack(output.logits, 1)]
    errors = []
    for context, new, found_TV in zip(contexts, generated, found, strict=True):
        sequence = [*context, *new[:-1]]
        rows = torch.tensor([sequence, [tokens[-1], tokens[-2], *sequence[2:]]], device=model.device)
        expected_TV, changed_TV = model(input_ids=rows, use_cache=False).logits[:, -NEW:]
        errors.append(relative_error(found_TV, expected_TV, changed_TV, model.dtype))
    model.train(training)
    return max(errors)
