"""Replay drafting from the positions at which verification rejected a draft, and write what was drafted as rows.

On-policy distillation on whole responses of the drafter trains it on text that no target writes. Draft-OPD (arXiv
2605.29343) keeps to the target's text instead, and replays drafting from the positions at which verification exposed an
error. Here the text is a finished set of the target's responses. For each response:

1. One forward pass of each model gives the acceptance probability min(1, p(x) / q(x)) of each of its tokens x (see
   `expected_efficiency`), and a walk over the tokens in blocks of gamma drafts samples where a draft was rejected.
2. From some of these positions the drafter drafts again, at most gamma tokens from its own distribution, at the
   temperature and top-p of the response.
3. A row has the target's text before the position as its prompt, and the draft as its response. Caching and finetuning
   treat it as any other row: the loss is taken at the drafted tokens, against the target's distributions after them.

The responses themselves stay in the set, so that the drafter is also trained on the target's text.

This follows the paper's abstract and the drafter of this project, which drafts token by token; the paper's drafters
draft a block at once from the target's hidden states.

Shapes: N response tokens of several sequences, L of one, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.batches import Sequence as Sample
from drafter.data.batches import by_budget, collate, cut, next_tokens, response_sequence
from drafter.data.dealing import deal_missing
from drafter.data.engines import Limits, Request, transformers_engine
from drafter.data.states import without_states
from drafter.data.target_cache import live_target
from drafter.decoding.expected_efficiency import acceptance_of_written
from drafter.models.inspection import has_plain_head
from drafter.models.loading import context_length
from drafter.progress import Report, silent
from drafter.warping import Sampling


class Pair(NamedTuple):
    """The models of speculative decoding."""

    target: PreTrainedModel
    drafter: PreTrainedModel


class Replay(NamedTuple):
    """How drafting is replayed.

    Attributes:
        per_response: the most replays of a response, each from another rejection.
        num_speculative_tokens: gamma, the number of drafted tokens per block, and the most tokens of a replay.
        top_p: of the responses' sampling, and of the drafter's.
        stop_ids: tokens that end a draft.
    """

    per_response: int
    num_speculative_tokens: int
    top_p: float
    stop_ids: list[int]


def write_replays(
    pair: Pair,
    responses: rows.Rows,
    folder: Folder,
    replay: Replay,
    *,
    batch_tokens: int,
    shard_size: int,
    seed: int,
    world_size: int = 1,
    writes: bool = True,
    report: Report = silent,
) -> int:
    """Write the training responses with their replays, in shards of `shard_size` responses. Keep complete shards.

    A shard depends only on its number and the seed, so that any number of ranks writes the same files.

    Returns:
        The number of shards, for `rows.finish`.
    """
    train = np.flatnonzero(responses.splits == "train").tolist()
    parts = [train[start : start + shard_size] for start in range(0, len(train), shard_size)]
    for number, tell in deal_missing(folder, [len(part) for part in parts], seed, world_size, report):
        kept = responses.read(parts[number])
        requests, found = plan_replays(pair, kept, replay, batch_tokens)
        limits = Limits(replay.top_p, replay.num_speculative_tokens, replay.stop_ids)
        drafts = transformers_engine(pair.drafter, limits, batch_tokens)(requests)
        written = [replayed_row(one, draft, replay.stop_ids) for one, draft in zip(requests, drafts, strict=True)]
        notes = {
            "responses": len(kept),
            "replays": len(written),
            "rejections": sum(found),
            "without_rejection": found.count(0),
        }
        if writes:
            rows.write_shard(folder, number, [*kept, *written], without_states(responses.schema), notes)
        tell(len(kept), sum(len(row["response_ids"]) for row in written))
    return len(parts)


def plan_replays(
    pair: Pair, responses: Sequence[rows.Row], replay: Replay, batch_tokens: int
) -> tuple[list[Request], list[int]]:
    """Return the requests to draft again, in the order of the responses, and the number of rejections in each response.

    A response is read as far as gamma tokens more fit into the contexts of both models.
    """
    gamma = replay.num_speculative_tokens
    room = min(map(context_length, pair)) - gamma
    samples = [cut(response_sequence(row), room) for row in responses]
    requests, found = [], []
    for row, sample, accept_L in zip(
        responses, samples, acceptance(pair, samples, replay.top_p, batch_tokens), strict=True
    ):
        accepted_L, rejected, start = torch.rand(len(accept_L)) < accept_L, [], 0
        for first, end in sample.predicted():
            positions = rejected_positions(accepted_L[start : start + end - first].tolist(), gamma)
            rejected += [first + position for position in positions]
            start += end - first
        chosen = torch.randperm(len(rejected))[: replay.per_response].tolist()
        found.append(len(rejected))
        for position in sorted(rejected[one] for one in chosen):
            name, prompt = f"{row['id']}@{position}", sample.ids_T[:position].tolist()
            requests.append(Request(name, row["kind"], row["split"], row["temperature"], prompt))
    return requests, found


def rejected_positions(accepted: Sequence[bool], num_speculative_tokens: int) -> list[int]:
    """Return where a draft was rejected when a text was generated in blocks.

    A block ends with a token of the target's: the one in the place of the rejected draft, or the one after gamma
    accepted drafts, for which nothing was drafted.

    >>> rejected_positions([True, False, False, True, True, False, False], num_speculative_tokens=2)
    [1, 2, 6]

    Args:
        accepted: for each token of the text, whether a draft there is accepted.
        num_speculative_tokens: gamma, the number of drafted tokens per block.
    """
    found, position = [], 0
    while position < len(accepted):
        drafts = list(accepted[position : position + num_speculative_tokens])
        count = drafts.index(False) if False in drafts else len(drafts)
        if count < len(drafts):
            found.append(position + count)
        position += count + 1
    return found


@torch.inference_mode()
def acceptance(pair: Pair, samples: Sequence[Sample], top_p: float, batch_tokens: int) -> list[torch.Tensor]:
    """Return the acceptance probabilities of the response tokens of each sample, on the CPU, each of shape (L,)."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    for indices in by_budget([len(sample.ids_T) for sample in samples], batch_tokens):
        batch = collate([samples[i] for i in indices]).uncached(pair.target.device)
        logits_q, logits_p = (live_target(model, batch, has_plain_head(model))[1] for model in pair)
        tokens_N, start = next_tokens(batch)[batch.target_mask_BT], 0
        for i, count in zip(indices, batch.target_mask_BT.sum(1).tolist(), strict=True):
            mine = slice(start, start + count)
            sampling = Sampling(samples[i].temperature, top_p)
            found[i] = acceptance_of_written(logits_p(mine), logits_q(mine), tokens_N[mine], sampling).cpu()
            start += count
    return found


def replayed_row(request: Request, draft: Any, stop_ids: list[int]) -> rows.Row:
    """Return the row (see responses.COLUMNS) of a replay: the target's text, then what the drafter drafted."""
    return {
        "id": request.id,
        "kind": request.kind,
        "split": request.split,
        "temperature": request.temperature,
        "prompt_ids": request.prompt_ids,
        "response_ids": draft,
        "turns": [len(request.prompt_ids), len(draft)],
        "truncated": draft[-1] not in stop_ids,
    }
