"""The tables of the paper's questions: which loss, how much the data matter, whether alignment carries over.

Each is made from the evaluations at hand; a row that was not run is blank. No torch here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drafter.metrics import Estimate, block_efficiency, estimate, paired_difference
from experiments.reporting.results import POOLED, Evaluation, Gamma, cell, cells, in_order
from experiments.reporting.tabular import Table, number, with_interval

# What the paper publishes as numbers (abstract and tables of architectures); its other results are figures.
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
}


def models(configs: dict[str, dict[str, Any]], parameters: dict[str, int]) -> Table:
    """Architectures and sizes.

    Args:
        configs: name ("target", "drafter") -> the model's config.json.
        parameters: the same names -> their number of parameters.
    """
    rows = []
    for name, config in configs.items():
        fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        named = [str(config.get(field) or config.get(OTHER_NAMES.get(field, ""), "")) for field in fields]
        ratio = "" if name == "target" else f"{parameters[name] / parameters['target']:.2%}"
        rows.append([name, *named, number(parameters[name]), ratio])
    rows += [[name, *map(str, sizes), number(count), ratio] for name, *sizes, count, ratio in PAPER_MODELS]
    columns = ["model", "layers", "hidden", "intermediate", "heads", "vocabulary", "parameters", "c"]
    return Table("models", "Architectures", columns, rows, "c is drafter / target parameters.")


OTHER_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
}


def losses(evaluations: Sequence[Evaluation], yardstick: str = "kld") -> Table:
    """Each loss on the tasks in the domain together: τ, its seeds, and its gain over the pretrained drafter and KLD."""
    names = list(dict.fromkeys(one.loss for one in evaluations))
    gammas = in_order(gamma for one in evaluations for _, gamma, _ in one.counts)
    compared = [name for name in ("pretrained", yardstick) if name in names]
    columns = ["drafter"]
    for gamma in gammas:
        columns += [f"τ, γ = {gamma}", "seeds", *(f"τ − {name}" for name in compared)]
    rows = []
    for name in names:
        row = [name]
        for gamma in gammas:
            found = of(evaluations, name)
            row += [efficiency(found, in_domain(found), gamma), by_seed(found, in_domain(found), gamma)]
            row += [
                with_interval(difference(evaluations, name, other, in_domain(found), gamma), signed=True)
                for other in compared
            ]
        rows.append(row)
    note = f"The tasks in the domain together; differences are paired by prompt. {PAPER_CLAIM}"
    return Table("losses", "Which loss?", columns, rows, note)


def out_of_domain(evaluations: Sequence[Evaluation], gamma: Gamma) -> Table:
    """What alignment does inside the domain and outside of it."""
    names = [name for name in dict.fromkeys(one.loss for one in evaluations) if name != "pretrained"]
    outside = [task for task, of_gamma in cells(evaluations[0]) if of_gamma == gamma and is_outside(evaluations, task)]
    columns = ["drafter", "in domain: τ − pretrained", *(f"{task}: τ − pretrained" for task in outside)]
    rows = []
    for name in names:
        tasks = [in_domain(of(evaluations, name)), *outside]
        gains = (difference(evaluations, name, "pretrained", task, gamma) for task in tasks)
        rows.append([name, *(with_interval(gain, signed=True) for gain in gains)])
    note = "The paper: on WMT18 De-En, which was not distilled, every finetuned drafter was behind the pretrained one."
    return Table("ood", f"Out of the domain, γ = {gamma}", columns, rows, note)


def data(evaluations: Sequence[Evaluation], variants: Sequence[Evaluation]) -> Table:
    """Each variant of the distillation set against the whole one, by the same loss."""
    base = variant_base(variants)
    rows, every = [], [*of(evaluations, base), *variants]
    gamma = in_order(gamma for one in variants for _, gamma, _ in one.counts)[0] if variants else 3
    outside = (
        [task for task, of_gamma in cells(every[0]) if is_outside(every, task) and of_gamma == gamma] if every else []
    )
    for label, what in DATA.items():
        name = f"{base}-{label}" if label else base
        found, row = of(every, name), [what]
        for task in [in_domain(found), *outside] if found else []:
            row += [efficiency(found, task, gamma), by_seed(found, task, gamma)]
            row.append(with_interval(difference(every, name, base, task, gamma), signed=True) if label else "")
        rows.append(row + [""] * (1 + 3 * (1 + len(outside)) - len(row)))
    columns = ["trained on", f"τ in domain, γ = {gamma}", "seeds", "− the whole set"]
    for task in outside:
        columns += [f"τ on {task}", "seeds", "− the whole set"]
    return Table("data", f"How much do the data matter? ({base})", columns, rows, "Differences are paired by prompt.")


def transfer(evaluations: Sequence[Evaluation], variants: Sequence[Evaluation]) -> Table:
    """Trained on one kind of instruction, tested on each task, against as many responses of all kinds."""
    base = variant_base(variants)
    every = [*of(evaluations, "pretrained"), *of(evaluations, base), *variants]
    reference = f"{base}-responses_33"
    only = [name for name in dict.fromkeys(one.loss for one in variants) if name.startswith(f"{base}-only_")]
    gamma = in_order(gamma for one in variants for _, gamma, _ in one.counts)[0] if variants else 3
    tasks = list(dict.fromkeys(task for task, of_gamma in cells(every[0]) if of_gamma == gamma)) if every else []
    tasks = [task for task in tasks if task != POOLED]
    named = {"pretrained": "nothing (pretrained)", **{name: f"{name.split('-only_')[1]} alone" for name in only}}
    named |= {reference: "as many of all kinds", base: "all responses"}
    rows = []
    for name, what in named.items():
        row = [what.replace("_", " ")]
        for task in tasks:
            value = efficiency(of(every, name), task, gamma)
            gain = difference(every, name, reference, task, gamma) if name in only else None
            row.append(f"{value} ({with_interval(gain, signed=True)})" if gain else value)
        rows.append(row)
    columns = ["trained on", *(f"τ on {task.replace('_', ' ')}" for task in tasks)]
    note = f"In parentheses: the paired difference to as many responses of all kinds ({base}, γ = {gamma})."
    return Table("transfer", "Does alignment carry over?", columns, rows, note)


def variant_base(variants: Sequence[Evaluation]) -> str:
    """The loss that the variants were trained with."""
    return variants[0].loss.split("-", 1)[0] if variants else "tvdpp"


def of(evaluations: Sequence[Evaluation], loss: str) -> list[Evaluation]:
    """Those of one loss: its seeds."""
    return [one for one in evaluations if one.loss == loss]


def in_domain(evaluations: Sequence[Evaluation]) -> str:
    """The tasks in the domain together, or the only one there is."""
    inside = {task for one in evaluations for task, *_ in one.counts if task in one.in_domain}
    return POOLED if len(inside) > 1 else next(iter(inside), POOLED)


def is_outside(evaluations: Sequence[Evaluation], task: str) -> bool:
    """Whether a task is none of the domain."""
    return task != POOLED and all(task not in one.in_domain for one in evaluations)


def efficiency(evaluations: Sequence[Evaluation], task: str, gamma: Gamma) -> str:
    """τ with its interval; blank where it was not run."""
    counts = cell(evaluations, task, gamma)
    return with_interval(estimate(counts, "block_efficiency")) if counts else ""


def by_seed(evaluations: Sequence[Evaluation], task: str, gamma: Gamma) -> str:
    """τ of each seed by itself."""
    rows = [list(cell([one], task, gamma).values()) for one in evaluations]
    return (
        " ".join(f"{float(block_efficiency(np.sum(counts, 0))):.2f}" for counts in rows if counts)
        if len(rows) > 1
        else ""
    )


def difference(evaluations: Sequence[Evaluation], name: str, other: str, task: str, gamma: Gamma) -> Estimate | None:
    """How much more τ one drafter has than another; None where they are one, or have not the same prompts."""
    ours, theirs = (cell(of(evaluations, loss), task, gamma) for loss in (name, other))
    if name == other or not ours or ours.keys() != theirs.keys():
        return None
    return paired_difference(ours, theirs, "block_efficiency")


def along(
    steps: Sequence[Evaluation], whole: Sequence[Evaluation], last_step: int
) -> dict[str, dict[str, list[tuple[int, Estimate]]]]:
    """loss -> task -> τ at each kept step, from the pretrained drafter (step 0) to the end, of the seeds of `steps`."""
    found: dict[str, dict[str, list[tuple[int, Estimate]]]] = {}
    for loss in dict.fromkeys(one.loss for one in steps):
        kept = of(steps, loss)
        seeds, gamma = {one.seed for one in kept}, next(gamma for _, gamma, _ in kept[0].counts)
        points = [(0, of(whole, "pretrained"))]
        points += [
            (step, [one for one in kept if one.step == step]) for step in sorted({one.step or 0 for one in kept})
        ]
        points.append((last_step, [one for one in of(whole, loss) if one.seed in seeds]))
        found[loss] = {
            task: [
                (step, estimate(counts, "block_efficiency"))
                for step, evaluations in points
                if (counts := cell(evaluations, task, gamma))
            ]
            for task in dict.fromkeys(task for task, *_ in kept[0].counts)
        }
    return found
