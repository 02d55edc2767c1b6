"""Make the tables that answer the paper's questions: which loss is best, how much the data matter, what transfers.

Each table is made from the evaluations that were run. The cells of the others are blank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drafter.metrics import Estimate, block_efficiency, estimate, paired_difference
from experiments.reporting.identity import PRETRAINED
from experiments.reporting.parts import Gamma
from experiments.reporting.results import POOLED, Evaluation, counts_by_prompt, sorted_gammas, tasks_and_gammas
from experiments.reporting.tabular import Table, number, with_interval

# The numbers that the paper prints, in its abstract and tables of architectures. Its other results are figures.
PAPER_MODELS = [
    ("Llama 2 7B Chat (paper's target)", 32, 4096, 11008, 32, 32000, 6.74e9, ""),
    ("Llama 2 Chat Drafter (paper's)", 4, 1024, 2816, 8, 32000, 115e6, "1.64%"),
]
PAPER_CLAIM = "The paper, with Llama 2 7B Chat and a drafter of 115M: τ up to 2.3, MBSU up to 2.4."

# The variants of conf/variant in the order of the table, with what each changes.
DATA = {
    "": "the whole set: the target's responses at four temperatures, 10% text",
    "responses_33": "a third of the responses",
    "responses_10": "a tenth of the responses",
    "text_0": "no pretraining text",
    "text_50": "half of the samples are pretraining text",
    "greedy": "the target's greedy responses alone",
    "reference": "the data's own answers in the place of the target's",
    "drafter": "on-policy: the drafter's answers, written anew in three rounds",
    "mixture": "on-policy by halves: the drafter's and the target's",
    "replay": "on-policy where drafts are rejected: replays beside the target's responses",
}


def models(configs: dict[str, dict[str, Any]], parameters: dict[str, int], active: dict[str, int]) -> Table:
    """Return the table of architectures and sizes, with the paper's own models.

    Args:
        configs: "target" or "drafter" -> the model's config.json.
        parameters: the same names -> the number of parameters.
        active: the same names -> the number of those that a token meets; fewer in a mixture of experts.
    """
    rows = []
    for name, config in configs.items():
        fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        named = [str(config.get(field) or config.get(OTHER_NAMES.get(field, ""), "")) for field in fields]
        ratio = "" if name == "target" else f"{active[name] / active['target']:.2%}"
        met = f" ({number(active[name])} active)" if active[name] < parameters[name] else ""
        rows.append([name, *named, number(parameters[name]) + met, ratio])
    rows += [[name, *map(str, sizes), number(count), ratio] for name, *sizes, count, ratio in PAPER_MODELS]
    columns = ["model", "layers", "hidden", "intermediate", "heads", "vocabulary", "parameters", "c"]
    of_mixtures = ", of a mixture of experts those that a token meets (active)" if active != parameters else ""
    return Table("models", "Architectures", columns, rows, f"c is drafter / target parameters{of_mixtures}.")


OTHER_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
}


def losses(evaluations: Sequence[Evaluation], yardstick: str = "kld") -> Table:
    """Return the table of losses: τ on all tasks in the domain, for each seed, and its gains.

    Args:
        evaluations: of the whole distillation set.
        yardstick: the series that is compared with, beside the pretrained drafter.
    """
    names = list(dict.fromkeys(one.series for one in evaluations))
    gammas = sorted_gammas(gamma for one in evaluations for _, gamma, _ in one.counts)
    compared = [name for name in (PRETRAINED, yardstick) if name in names]
    columns = ["drafter"]
    for gamma in gammas:
        columns += [f"τ, γ = {gamma}", "seeds", *(f"τ − {name}" for name in compared)]
    rows = []
    for name in names:
        row = [name]
        for gamma in gammas:
            found = of_series(evaluations, name)
            row += [efficiency(found, domain_task(found), gamma), by_seed(found, domain_task(found), gamma)]
            row += [
                with_interval(difference(evaluations, name, other, domain_task(found), gamma), signed=True)
                for other in compared
            ]
        rows.append(row)
    note = f"The tasks in the domain together; differences are paired by prompt. {PAPER_CLAIM}"
    return Table("losses", "Which loss?", columns, rows, note)


def out_of_domain(evaluations: Sequence[Evaluation], gamma: Gamma) -> Table:
    """Return the table of gains over the pretrained drafter, inside the domain and outside of it."""
    names = [name for name in dict.fromkeys(one.series for one in evaluations) if name != PRETRAINED]
    outside = [
        task
        for task, of_gamma in tasks_and_gammas(evaluations[0])
        if of_gamma == gamma and is_outside(evaluations, task)
    ]
    columns = ["drafter", "in domain: τ − pretrained", *(f"{task}: τ − pretrained" for task in outside)]
    rows = []
    for name in names:
        tasks = [domain_task(of_series(evaluations, name)), *outside]
        gains = (difference(evaluations, name, PRETRAINED, task, gamma) for task in tasks)
        rows.append([name, *(with_interval(gain, signed=True) for gain in gains)])
    note = "The paper: on WMT18 De-En, which was not distilled, every finetuned drafter was behind the pretrained one."
    return Table("ood", f"Out of the domain, γ = {gamma}", columns, rows, note)


def data(evaluations: Sequence[Evaluation], variants: Sequence[Evaluation]) -> Table:
    """Return the table of variants of the distillation set, each compared with the whole set and the same loss."""
    base = variant_base(variants)
    rows, every = [], [*of_series(evaluations, base), *variants]
    gamma = sorted_gammas(gamma for one in variants for _, gamma, _ in one.counts)[0] if variants else 3
    measured = tasks_and_gammas(every[0]) if every else []
    outside = [task for task, of_gamma in measured if is_outside(every, task) and of_gamma == gamma]
    for label, what in DATA.items():
        name = series_of(variants, base, label) if label else base
        found, row = of_series(every, name), [what]
        for task in [domain_task(found), *outside] if found else []:
            row += [efficiency(found, task, gamma), by_seed(found, task, gamma)]
            row.append(with_interval(difference(every, name, base, task, gamma), signed=True) if label else "")
        rows.append(row + [""] * (1 + 3 * (1 + len(outside)) - len(row)))
    columns = ["trained on", f"τ in domain, γ = {gamma}", "seeds", "− the whole set"]
    for task in outside:
        columns += [f"τ on {task}", "seeds", "− the whole set"]
    return Table("data", f"How much do the data matter? ({base})", columns, rows, "Differences are paired by prompt.")


def transfer(evaluations: Sequence[Evaluation], variants: Sequence[Evaluation]) -> Table:
    """Return the table of drafters finetuned on one kind of instruction, tested on each task.

    They are compared with drafters finetuned on as many responses to all kinds of instructions.
    """
    base = variant_base(variants)
    every = [*of_series(evaluations, PRETRAINED), *of_series(evaluations, base), *variants]
    reference = series_of(variants, base, "responses_33")
    only = {one.series: f"{' and '.join(one.drafter.kinds)} alone" for one in variants if one.drafter.kinds}
    gamma = sorted_gammas(gamma for one in variants for _, gamma, _ in one.counts)[0] if variants else 3
    measured = tasks_and_gammas(every[0]) if every else []
    tasks = list(dict.fromkeys(task for task, of_gamma in measured if of_gamma == gamma and task != POOLED))
    named = {PRETRAINED: "nothing (pretrained)", **only}
    named |= {reference: "as many of all kinds", base: "all responses"}
    rows = []
    for name, what in named.items():
        row = [what.replace("_", " ")]
        for task in tasks:
            value = efficiency(of_series(every, name), task, gamma)
            gain = difference(every, name, reference, task, gamma) if name in only else None
            row.append(f"{value} ({with_interval(gain, signed=True)})" if gain else value)
        rows.append(row)
    columns = ["trained on", *(f"τ on {task.replace('_', ' ')}" for task in tasks)]
    note = f"In parentheses: the paired difference to as many responses of all kinds ({base}, γ = {gamma})."
    return Table("transfer", "Does alignment carry over?", columns, rows, note)


def variant_base(variants: Sequence[Evaluation]) -> str:
    """Return the loss that the variants were trained with."""
    return next((one.drafter.loss for one in variants if one.drafter.loss), "tvdpp")


def series_of(variants: Sequence[Evaluation], loss: str, variant: str) -> str:
    """Return the series of a loss's variant for which nothing else was swept; "" if none or several were run."""
    found = {
        one.series
        for one in variants
        if (one.drafter.loss, one.drafter.variant, one.drafter.swept) == (loss, variant, None)
    }
    return found.pop() if len(found) == 1 else ""


def of_series(evaluations: Sequence[Evaluation], series: str) -> list[Evaluation]:
    """Return the evaluations of one series: its seeds."""
    return [one for one in evaluations if one.series == series]


def domain_task(evaluations: Sequence[Evaluation]) -> str:
    """Return the task over which results in the domain are summed: the only task in the domain, or POOLED."""
    inside = {task for one in evaluations for task, *_ in one.counts if task in one.in_domain}
    return POOLED if len(inside) > 1 else next(iter(inside), POOLED)


def is_outside(evaluations: Sequence[Evaluation], task: str) -> bool:
    """Return whether a task lies outside of the domain."""
    return task != POOLED and all(task not in one.in_domain for one in evaluations)


def efficiency(evaluations: Sequence[Evaluation], task: str, gamma: Gamma) -> str:
    """Return τ with its interval; "" if it was not run."""
    counts = counts_by_prompt(evaluations, task, gamma)
    return with_interval(estimate(counts, "block_efficiency")) if counts else ""


def by_seed(evaluations: Sequence[Evaluation], task: str, gamma: Gamma) -> str:
    """Return τ of each seed; "" if there is only one."""
    rows = [list(counts_by_prompt([one], task, gamma).values()) for one in evaluations]
    return (
        " ".join(f"{float(block_efficiency(np.sum(counts, 0))):.2f}" for counts in rows if counts)
        if len(rows) > 1
        else ""
    )


def difference(evaluations: Sequence[Evaluation], name: str, other: str, task: str, gamma: Gamma) -> Estimate | None:
    """Return how much higher τ of one series is than of another; None if they are the same, or differ in prompts."""
    ours, theirs = (counts_by_prompt(of_series(evaluations, series), task, gamma) for series in (name, other))
    if name == other or not ours or ours.keys() != theirs.keys():
        return None
    return paired_difference(ours, theirs, "block_efficiency")


def efficiency_by_step(
    steps: Sequence[Evaluation], finished: Sequence[Evaluation], last_step: int
) -> dict[str, dict[str, list[tuple[int, Estimate]]]]:
    """Return τ along finetuning: at the pretrained drafter (step 0), at each kept step and at the end.

    Args:
        steps: evaluations of the kept steps' drafters.
        finished: evaluations of the pretrained and the finished drafters, of which the seeds in `steps` are used.
        last_step: the step at the end.

    Returns:
        series -> task -> (step, τ).
    """
    found: dict[str, dict[str, list[tuple[int, Estimate]]]] = {}
    for series in dict.fromkeys(one.series for one in steps):
        kept = of_series(steps, series)
        seeds, gamma = {one.drafter.seed for one in kept}, next(gamma for _, gamma, _ in kept[0].counts)
        points = [(0, of_series(finished, PRETRAINED))]
        for step in sorted({one.drafter.step or 0 for one in kept}):
            points.append((step, [one for one in kept if one.drafter.step == step]))
        points.append((last_step, [one for one in of_series(finished, series) if one.drafter.seed in seeds]))
        found[series] = {
            task: [
                (step, estimate(counts, "block_efficiency"))
                for step, evaluations in points
                if (counts := counts_by_prompt(evaluations, task, gamma))
            ]
            for task in dict.fromkeys(task for task, *_ in kept[0].counts)
        }
    return found
