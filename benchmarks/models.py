"""Which model families work with which stage, found with small random models: `make test-models` writes docs/MODELS.md.

    python -m benchmarks.models                                  # all families, into docs/MODELS.md (some minutes)
    python -m benchmarks.models --families llama qwen3_next      # these alone, printed

Everything is compared with forward passes without a cache. A cell says "exact", or why the stage refuses the family.
"""

import argparse
import logging
import multiprocessing
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.families import FAMILIES, family
from drafter.data.batches import collate, response_mask, response_sequence
from drafter.data.engines import Limits, Request, transformers_engine
from drafter.data.padded import way_of
from drafter.data.target_cache import live_target
from drafter.decoding.capabilities import decoder_of
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode, speculative_decode_batch
from drafter.decoding.stateful import StatefulDecoder
from drafter.models.compatibility import resize_vocabulary
from drafter.models.inspection import check_drafter_head, has_plain_head, hidden_states, vocabulary_rows
from drafter.models.loading import load_model

PROMPTS = [[3, 5, 7, 9, 11, 2, 4], [13, 8, 6], [*range(21, 33)], [9, 8, 7], [6]]
NEW, GAMMA = 12, 3
TEXTS: dict[tuple[str | int, ...], list[int]] = {}  # a kind and a prompt -> the text of forward passes
SHORT = 8  # tokens of a batch, so that a sliding window of 8 tokens is not exceeded
HEAD = """# Models

Which architectures of transformers {version} work with which stage. `make test-models` writes this page: it builds a
small model of each family with random weights and compares every stage with forward passes without a cache. A family
is named by the `model_type` of its config.json. *no* and a number: the stage refuses it, with the error of that number
below the table.

- **decode**: speculative and autoregressive decoding give the target's greedy text. *replays*: the model has states
  (recurrent, linear-attention, convolution), which are copied before a verification; after a rejected draft they are
  put back, and the accepted tokens are read again. *one by one*: its later calls take one token each, so that
  speculative decoding is right and its block efficiency is known, but it saves no time in this project's loop.
- **batch**: the same for several sequences at once (`evaluate.batch_size`). If it is refused, sequences are decoded one
  at a time. A family with a sliding window is tried within the window, and is refused for longer sequences.
- **respond**: the responses are the target's greedy text. *one length*, *one at a time*: a batch has prompts of one
  length, or one prompt, because the family takes padding for tokens, or mixes the sequences of a batch.
- **cache**: the distributions of a padded batch are those of each sequence alone. *sparse*: hidden states do not
  determine the logits (a scale or a soft cap), so `cache.format=exact` is refused.
- **finetune**: as a drafter, it has a plain head, a finite loss and finite gradients. As a target it is what *cache*
  says, because finetuning computes the target's distributions in the same way.
- **export**: as a drafter, it is padded to the target's vocabulary, saved and loaded, and its logits are the same.

"""


def main() -> None:
    """Try all families, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="print these instead of writing the page")
    parser.add_argument("--out", default="docs/MODELS.md")
    asked = parser.parse_args()
    kinds = asked.families or list(FAMILIES)
    reasons: dict[str, int] = {}  # reason -> its number
    lines = ["| family | " + " | ".join(CELLS) + " |", "| --- " * (len(CELLS) + 1) + "|"]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for kind, found in zip(kinds, pool.imap(cells, kinds), strict=True):
            row = [word if reason is None else f"no [{number(reason, reasons)}]" for word, reason in found]
            lines.append(f"| {kind} | " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    notes = [f"{number}. {reason}." for reason, number in reasons.items()]
    page = HEAD.format(version=transformers.__version__) + "\n".join([*lines, "", *notes]) + "\n"
    print("\n".join(["", *notes, f"{time.perf_counter() - began:.0f} s"]))
    if not asked.families:
        Path(asked.out).write_text(page, encoding="utf-8")


def number(reason: str, reasons: dict[str, int]) -> int:
    """Return the number of a reason."""
    return reasons.setdefault(reason, len(reasons) + 1)


def cells(kind: str) -> list[tuple[str, str | None]]:
    """Return what each check says of a family: its word, and None or the reason for which the family is refused."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    return [cell(kind, check) for check in CELLS.values()]


def cell(kind: str, check: Callable[[PreTrainedModel], str]) -> tuple[str, str | None]:
    """Return what a check says of a family."""
    try:
        return check(family(kind)), None
    except Exception as problem:  # whatever a model raises belongs into the table
        name = type(problem).__name__
        sentence = str(problem).splitlines()[0] if str(problem) else name
        if isinstance(problem, ValueError):  # a refusal, which names the class of the model
            return "", re.sub(r"^\w+For\w+|^\w+LMHeadModel|^\w+Model", "It", sentence)
        return "", f"{name}: {sentence}"


@torch.no_grad()
def uncached(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Return the greedy text of forward passes without a cache. The models of one kind are equal."""
    key = (model.config.model_type, *prompt)
    if len(TEXTS.setdefault(key, [])) < count:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        TEXTS[key] = ids[len(prompt) :]
    return TEXTS[key][:count]


def like(model: PreTrainedModel) -> PreTrainedModel:
    """Return a drafter that often agrees: the model with a slightly changed output embedding."""
    drafter = family(model.config.model_type)
    weight = drafter.get_output_embeddings().weight
    weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return drafter


def same(found: object, expected: object) -> None:
    """Raise AssertionError if a text is not the expected one."""
    if found != expected:
        raise AssertionError("the text is not the target's own")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise AssertionError if logits are not the expected ones up to rounding."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * scale, msg="the logits are not the model's own")


def decode(target: PreTrainedModel) -> str:
    """Decode each prompt with a drafter of the same family, and without one."""
    drafter, options = like(target), DecodingOptions(NEW)
    decoder = decoder_of(target)
    for prompt in PROMPTS:
        expected = uncached(target, prompt, NEW)
        same(autoregressive_decode(target, prompt, options).tokens, expected)
        same(speculative_decode(target, drafter, prompt, GAMMA, options).tokens, expected)
    if not isinstance(decoder, StatefulDecoder):
        return "exact"
    return "exact, one by one" if decoder.one_at_a_time else "exact, replays"


def batch(target: PreTrainedModel) -> str:
    """Decode short sequences side by side."""
    prompts = [prompt[:3] for prompt in PROMPTS]
    options = DecodingOptions(SHORT - GAMMA - 1 - 3 + 1)
    found = speculative_decode_batch(target, like(target), prompts, 1, options)
    same([one.tokens for one in found], [uncached(target, prompt, options.max_new_tokens) for prompt in prompts])
    return "exact"


def respond(target: PreTrainedModel) -> str:
    """Generate responses as `experiments.respond` does."""
    requests = [Request(str(number), "", "train", 0.0, prompt) for number, prompt in enumerate(PROMPTS)]
    found = transformers_engine(target, Limits(1.0, NEW, []), 1000)(requests)
    same(found, [uncached(target, prompt, NEW) for prompt in PROMPTS])
    way = way_of(target)
    return "exact" + ("" if way.pads else ", one length" if way.batches else ", one at a time")


@torch.no_grad()
def cache(target: PreTrainedModel) -> str:
    """Compute the distributions that `experiments.cache` stores."""
    rows = [{"prompt_ids": prompt, "response_ids": [4, 8, 15, 16], "temperature": 1.0} for prompt in PROMPTS]
    together, plain = collate([response_sequence(row, None) for row in rows]), has_plain_head(target)
    _, logits = live_target(target, together, plain)
    alone = [collate([response_sequence(row, None)]) for row in rows]
    expected = [target(input_ids=one.input_ids_BT, use_cache=False).logits[response_mask(one)] for one in alone]
    close(logits(slice(None)), torch.cat(expected))
    return "exact" if plain else "sparse"


def finetune(drafter: PreTrainedModel) -> str:
    """Train the model as a drafter: check its head, and compute a loss and its gradients."""
    check_drafter_head(drafter)
    drafter.requires_grad_(True).train()
    ids_BT = torch.tensor([PROMPTS[2]])
    logits_BTV = drafter.get_output_embeddings()(hidden_states(drafter, ids_BT, torch.ones_like(ids_BT)))
    loss = torch.nn.functional.cross_entropy(logits_BTV[0, :-1], ids_BT[0, 1:])
    loss.backward()
    gradients = [parameter.grad for parameter in drafter.parameters() if parameter.grad is not None]
    if not loss.isfinite() or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise ValueError("the loss or a gradient is not finite")
    if len(gradients) < len(list(drafter.parameters())) / 2:
        raise ValueError("most parameters have no gradient")
    return "works"


@torch.no_grad()
def export(drafter: PreTrainedModel) -> str:
    """Pad the vocabulary, save the model, load it, and compare its logits."""
    ids, rows = torch.tensor([PROMPTS[2]]), vocabulary_rows(drafter)
    expected = drafter(input_ids=ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        resize_vocabulary(drafter, rows + 8).save_pretrained(folder)
        loaded = load_model(folder).eval()
        close(loaded(input_ids=ids, use_cache=False).logits[..., :rows], expected)
    return "exact"


CELLS = {
    "decode": decode,
    "batch": batch,
    "respond": respond,
    "cache": cache,
    "finetune": finetune,
    "export": export,
}

if __name__ == "__main__":
    main()
