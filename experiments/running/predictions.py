"""Predict τ and the cost of blocks at every γ from what the target generated, without decoding.

Shapes: N answers, G values of γ, L tokens of an answer, B sequences, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from drafter.decoding.drafting import Drafter, models_of, without_model
from drafter.decoding.evaluation import Task
from drafter.decoding.expected_efficiency import (
    acceptance_of_written,
    expected_blocks,
    expected_blocks_with_proposals,
)
from drafter.decoding.generation import Generation
from drafter.decoding.ngrams import TextDrafter
from drafter.decoding.timings import CallTimings


def acceptance_of_answer(
    task: Task, tokens: list[int], target: PreTrainedModel, drafter: PreTrainedModel
) -> torch.Tensor:
    """Return the acceptance probability of each token that the target generated, if the model drafts it, shape (L,)."""
    return acceptance_by_rule(task, tokens, target, drafter, [task.options.rule])[task.options.rule]


@torch.inference_mode()
def acceptance_by_rule(
    task: Task, tokens: list[int], target: PreTrainedModel, drafter: PreTrainedModel, rules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the same for several acceptance rules, from one forward pass of each model."""
    ids = torch.tensor([[*task.prompt, *tokens]], device=target.device)
    p_LV, q_LV = (model(input_ids=ids, logits_to_keep=len(tokens) + 1).logits[0, :-1] for model in (drafter, target))
    tokens_L = torch.tensor(tokens, device=target.device)
    return {rule: acceptance_of_written(p_LV, q_LV, tokens_L, task.options.sampling, rule) for rule in rules}


class ExpectedCounts(NamedTuple):
    """What is expected of decoding N answers at γ = 1 … G.

    Attributes:
        tokens_N: generated tokens.
        blocks_NG: the number of blocks.
        costs_NG: what these cost, in target calls with one token.
    """

    tokens_N: np.ndarray
    blocks_NG: np.ndarray
    costs_NG: np.ndarray

    def ratios(self) -> list[tuple[float, float]]:
        """Return τ and the cost of a block at each γ, over all answers."""
        blocks_G = self.blocks_NG.sum(0)
        efficiencies, costs = self.tokens_N.sum() / blocks_G, self.costs_NG.sum(0) / blocks_G
        return list(zip(efficiencies.tolist(), costs.tolist(), strict=True))


def expected_counts(
    tasks: Sequence[Task],
    answers: Sequence[list[int]],
    target: PreTrainedModel,
    drafter: Drafter,
    timings: CallTimings,
    largest: int,
    accepts: Sequence[torch.Tensor] | None = None,
) -> ExpectedCounts:
    """Return the expected blocks of each answer, and their cost in target calls, at γ = 1 … largest.

    A block costs v(n), where n is its number of drafts, and c for each draft of the model; without a model, c once.
    Models with states also read the accepted tokens again (see drafter.decoding.timings).

    Args:
        tasks: the prompts.
        answers: what the target generated for each.
        target: the target.
        drafter: the drafter.
        timings: c and v.
        largest: the largest γ.
        accepts: the acceptance probabilities of each answer's tokens if the model drafts them, if they are known.
    """
    models = models_of(drafter)
    if models and accepts is None:
        pairs = zip(tasks, answers, strict=True)
        accepts = [acceptance_of_answer(task, answer, target, models[0]) for task, answer in pairs]
    tokens_N = np.array([len(answer) for answer in answers])
    if accepts is not None and not without_model(drafter):
        blocks_NG = blocks_of_answers(accepts, largest)
        return ExpectedCounts(
            tokens_N, blocks_NG, blocks_NG * [timings.block(gamma) for gamma in range(1, largest + 1)]
        )
    blocks_NG, costs_NG = np.zeros((2, len(answers), largest))
    scoring = np.array([timings.scoring(count) for count in range(largest + 1)])
    for number, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
        accept_L = accepts[number].double().cpu().numpy() if models and accepts is not None else None
        proposals = proposals_along(without_model(drafter), task.prompt, answer, largest)
        for gamma in range(1, largest + 1):
            found = expected_blocks_with_proposals(proposals, answer, accept_L, gamma)
            blocks = found.by_drafted.sum()
            per_draft = timings.drafting(gamma) / gamma
            drafting = per_draft * found.drafted_by_model if models else timings.ratio * blocks
            blocks_NG[number, gamma - 1] = blocks
            costs_NG[number, gamma - 1] = drafting + found.by_drafted @ scoring[: gamma + 1]
    return ExpectedCounts(tokens_N, blocks_NG, costs_NG)


def block_efficiencies(accepts: Sequence[torch.Tensor], largest: int) -> list[float]:
    """Return the expected block efficiency of a draft model at γ = 1 … largest.

    Args:
        accepts: the acceptance probabilities of the tokens of each sequence that the target generated, shape (L,).
        largest: the largest γ.
    """
    tokens = sum(map(len, accepts))
    return (tokens / blocks_of_answers(accepts, largest).sum(0)).tolist()


def blocks_of_answers(accepts: Sequence[torch.Tensor], largest: int) -> np.ndarray:
    """Return the expected number of blocks of each sequence at γ = 1 … largest, shape (N, G), of a draft model.

    Args:
        accepts: see `block_efficiencies`.
        largest: the largest γ.
    """
    rows = []
    for accept_L in accepts:
        lengths_B = torch.tensor([len(accept_L)], device=accept_L.device)
        rows.append([expected_blocks(accept_L[None], lengths_B, gamma).item() for gamma in range(1, largest + 1)])
    return np.array(rows)


def proposals_along(
    drafters: Sequence[TextDrafter], prompt: list[int], answer: list[int], largest: int
) -> list[list[int]]:
    """Return what the first drafter that finds something proposes before each token of an answer."""
    sequence, found = Generation(list(prompt), len(prompt), len(prompt) + len(answer)), []
    for token in answer:
        proposed = (one.propose(sequence, largest) for one in drafters)
        found.append(next((drafts for drafts in proposed if drafts), []))
        sequence.tokens.append(token)
    return found
