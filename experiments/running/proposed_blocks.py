"""Predict τ and the cost of blocks whose drafts are proposed without a model, from what the target generated."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from drafter.decoding.drafting import Drafter, models_of, without_model
from drafter.decoding.evaluation import Task
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks_with_proposals
from drafter.decoding.generation import Generation
from drafter.decoding.ngrams import TextDrafter
from drafter.decoding.timings import CallTimings


def acceptance_of_answer(
    task: Task, tokens: list[int], target: PreTrainedModel, drafter: PreTrainedModel
) -> torch.Tensor:
    """Return the acceptance probability of each token that the target generated, if the model drafts it, shape (L,)."""
    ids = torch.tensor([[*task.prompt, *tokens]], device=target.device)
    p_LV, q_LV = (model(input_ids=ids, logits_to_keep=len(tokens) + 1).logits[0, :-1] for model in (drafter, target))
    tokens_L = torch.tensor(tokens, device=target.device)
    return acceptance_of_written(p_LV, q_LV, tokens_L, task.options.sampling, task.options.rule)


@torch.inference_mode()
def predict(
    tasks: Sequence[Task],
    answers: Sequence[list[int]],
    target: PreTrainedModel,
    drafter: Drafter,
    timings: CallTimings,
    largest: int,
) -> list[tuple[float, float]]:
    """Return τ and the cost of a block in target calls at γ = 1 … largest.

    A block costs v(n), where n is its number of drafts, and c for each draft of the model; without a model, c once.
    Models with states also read the accepted tokens again (see drafter.decoding.timings).

    Args:
        tasks: the prompts.
        answers: what the target generated for each.
        target: the target.
        drafter: a drafter without a model, or a combination.
        timings: c and v.
        largest: the largest γ.
    """
    models = models_of(drafter)
    by_drafted, by_model, tokens = np.zeros((largest, largest + 1)), np.zeros(largest), 0
    for task, answer in zip(tasks, answers, strict=True):
        accept_L = acceptance_of_answer(task, answer, target, models[0]).double().cpu().numpy() if models else None
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
