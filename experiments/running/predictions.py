"""Predict τ and the cost of blocks at every γ from what the target generated, without decoding."""

from collections.abc import Sequence

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


def predict(
    tasks: Sequence[Task],
    answers: Sequence[list[int]],
    target: PreTrainedModel,
    drafter: Drafter,
    timings: CallTimings,
    largest: int,
    accepts: Sequence[torch.Tensor] | None = None,
) -> list[tuple[float, float]]:
    """Return τ and the cost of a block in target calls at γ = 1 … largest.

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
    if accepts is not None and not without_model(drafter):
        efficiencies = block_efficiencies(accepts, largest)
        return [(efficiency, timings.block(gamma)) for gamma, efficiency in enumerate(efficiencies, start=1)]
    by_drafted, by_model, tokens = np.zeros((largest, largest + 1)), np.zeros(largest), 0
    for number, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
        accept_L = accepts[number].double().cpu().numpy() if models and accepts is not None else None
        proposals = proposals_along(without_model(drafter), task.prompt, answer, largest)
        for gamma in range(1, largest + 1):
            found = expected_blocks_with_proposals(proposals, answer, accept_L, gamma)
            by_drafted[gamma - 1, : gamma + 1] += found.by_drafted
            by_model[gamma - 1] += found.drafted_by_model
        tokens += len(answer)
    blocks = by_drafted.sum(1)
    scoring = by_drafted @ np.array([timings.scoring(count) for count in range(largest + 1)]) / blocks
    if models:
        drafting = [timings.drafting(gamma) / gamma for gamma in range(1, largest + 1)] * by_model / blocks
    else:
        drafting = np.full(largest, timings.ratio)
    return list(zip((tokens / blocks).tolist(), (drafting + scoring).tolist(), strict=True))


def block_efficiencies(accepts: Sequence[torch.Tensor], largest: int) -> list[float]:
    """Return the expected block efficiency of a draft model at γ = 1 … largest.

    Args:
        accepts: the acceptance probabilities of the tokens of each sequence that the target generated, shape (L,).
        largest: the largest γ.
    """
    blocks, tokens = np.zeros(largest), 0
    for accept_L in accepts:
        lengths_B = torch.tensor([len(accept_L)], device=accept_L.device)
        blocks += [expected_blocks(accept_L[None], lengths_B, gamma).item() for gamma in range(1, largest + 1)]
        tokens += len(accept_L)
    return (tokens / blocks).tolist()


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
