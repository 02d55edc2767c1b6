"""Count the blocks that a drafter is expected to need for responses of the target."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from drafter.artifacts.rows import Rows
from drafter.data.batches import Batch, collate, next_tokens, response_mask, response_sequence
from drafter.data.batches import Sequence as Sample
from drafter.data.target_cache import restore, target_at
from drafter.decoding.drafting import Drafter, models_of, without_model
from drafter.decoding.expected_efficiency import (
    acceptance_of_written,
    expected_blocks,
    expected_blocks_with_proposals,
)
from drafter.losses.chunked import chunk_rows
from drafter.models.loading import OutputEmbedding
from drafter.warping import Sampling
from experiments.running.predictions import proposals_along

READ_AT_ONCE = 64  # rows of the cache


class Judged(NamedTuple):
    """A conversation with the target's responses, and the target's states or distributions at their tokens."""

    id: str
    kind: str
    sample: Sample


def judged_responses(rows: Rows) -> Iterator[Judged]:
    """Read the validation responses of a cache."""
    chosen = np.flatnonzero(rows.splits == "validation").tolist()
    for start in range(0, len(chosen), READ_AT_ONCE):
        for row in rows.read(chosen[start : start + READ_AT_ONCE]):
            yield Judged(row["id"], row["kind"], response_sequence(row, restore(row, rows.schema)))


def expected_counts(
    drafter: Drafter,
    target: PreTrainedModel | OutputEmbedding,
    judged: Judged,
    gammas: Sequence[int],
    rules: Sequence[str],
    top_p: float,
) -> list[dict[str, Any]]:
    """Return the tokens of a row's responses, and the blocks that the drafter is expected to need, for each γ and rule.

    At temperature 0 all rules are the same, and there is one count, without a rule.

    Args:
        drafter: the drafter.
        target: the target, or its output embedding, which turns cached states into logits.
        judged: the row.
        gammas: values of γ.
        rules: acceptance rules.
        top_p: the top-p with which the responses were generated. The drafter is served with the same.
    """
    batch = collate([judged.sample])
    sampling = Sampling(float(batch.temperature_B[0]) / 1e6, top_p)
    greedy = sampling.temperature == 0
    chosen, models = list(rules[:1] if greedy else rules), models_of(drafter)
    accepts = acceptance(models[0], target, batch, sampling, chosen) if models else dict.fromkeys(chosen)
    parts = judged.sample.predicted()
    lengths = [end - start for start, end in parts]
    proposals = [proposals_of(drafter, judged.sample, part, max(gammas)) for part in parts]
    rows = []
    for gamma in gammas:
        for rule in chosen:
            blocks, first = 0.0, 0
            for (start, end), length, proposed in zip(parts, lengths, proposals, strict=True):
                accept = accepts[rule]
                accept_L = None if accept is None else accept[first : first + length]
                blocks += blocks_of(accept_L, judged.sample.ids_T[start:end].tolist(), proposed, gamma)
                first += length
            named = {} if greedy else {"rule": rule}
            where = {"prompt": judged.id, "kind": judged.kind, "temperature": sampling.temperature, "gamma": gamma}
            rows.append({**where, **named, "tokens": sum(lengths), "blocks": blocks})
    return rows


@torch.inference_mode()
def acceptance(
    model: PreTrainedModel,
    target: PreTrainedModel | OutputEmbedding,
    batch: Batch,
    sampling: Sampling,
    rules: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Return by rule the acceptance probability of each response token of a row, shape (N,), on the CPU.

    They are computed on the device of the drafter, where the target is, too.

    Raises:
        ValueError: the drafter's logits are not numbers.
    """
    here = batch.uncached(model.device)
    mask_BT = response_mask(here)
    tokens_N, q = next_tokens(here)[mask_BT], target_at(target, batch)
    p_NV = model(input_ids=here.input_ids_BT, use_cache=False).logits[mask_BT]
    if p_NV.isnan().any():
        raise ValueError(f"the logits of drafter '{model.name_or_path}' are not numbers: leave it out of `drafters`")
    step = chunk_rows(p_NV.device, p_NV.shape[-1])
    parts: dict[str, list[torch.Tensor]] = {rule: [] for rule in rules}
    for start in range(0, len(p_NV), step):
        rows = slice(start, start + step)
        # `ratio` needs the full distribution, which the command refuses to look for in a sparse cache.
        q_nV: Any = q(rows) if "ratio" in rules and sampling.temperature else None
        for rule in rules:
            parts[rule].append(acceptance_of_written(p_NV[rows], q_nV, tokens_N[rows], sampling, rule))
    return {rule: torch.cat(found).cpu() for rule, found in parts.items()}


def proposals_of(drafter: Drafter, sample: Sample, part: tuple[int, int], gamma: int) -> list[list[int]] | None:
    """Return what the drafter proposes without a model before each token of a response; None if it always has one."""
    if not (texts := without_model(drafter)):
        return None
    start, end = part
    return proposals_along(texts, sample.ids_T[:start].tolist(), sample.ids_T[start:end].tolist(), gamma)


def blocks_of(accept_L: torch.Tensor | None, tokens: list[int], proposals: list[list[int]] | None, gamma: int) -> float:
    """Return the expected number of blocks of one response.

    Args:
        accept_L: the acceptance probability of each token if the model drafts it; None if there is no model.
        tokens: the L tokens.
        proposals: what is proposed without a model before each token; None if a model drafts everything.
        gamma: γ.
    """
    if proposals is None and accept_L is not None:
        return float(expected_blocks(accept_L[None], torch.tensor([len(tokens)]), gamma))
    accept = None if accept_L is None else accept_L.double().numpy()
    return float(expected_blocks_with_proposals(proposals or [], tokens, accept, gamma).by_drafted.sum())
