"""The end of a pipeline in three lines: which drafter is best, whether it pays here, and what to do next."""

from drafter.metrics import estimate
from experiments.reporting.results import POOLED, Evaluation, cell, cells, in_order
from experiments.reporting.tabular import with_interval


def conclusions(evaluations: list[Evaluation], report: str) -> list[str]:
    """Return three lines about the finetuned drafters at the smallest γ, on the tasks in the domain together."""
    found = cells(evaluations[0])
    gamma = in_order(gamma for _, gamma in found)[0]
    tasks = [task for task, of in found if of == gamma]
    inside = [task for task in tasks if task in evaluations[0].in_domain]
    task = POOLED if POOLED in tasks else (inside or tasks)[0]
    losses = dict.fromkeys(one.loss for one in evaluations)
    counts = {loss: cell([one for one in evaluations if one.loss == loss], task, gamma) for loss in losses}
    efficiency = {loss: estimate(of_loss, "block_efficiency") for loss, of_loss in counts.items()}
    finetuned = [loss for loss in losses if loss != "pretrained"]
    best = max(finetuned or losses, key=lambda loss: efficiency[loss].value)
    before = efficiency.get("pretrained") if best != "pretrained" else None
    than = f" against {with_interval(before)} pretrained" if before else ""
    where = "the tasks in the domain" if task == POOLED else f"the task {task}"
    rate = estimate(counts[best], "token_rate_ratio")
    verdict = "It is undecided whether it pays on this machine"
    if rate.low > 1:
        verdict = "It pays on this machine"
    elif rate.high < 1:
        verdict = "It does not pay on this machine"
    return [
        f"Best drafter: {best}, block efficiency {with_interval(efficiency[best])}{than} (γ = {gamma}, {where}).",
        f"{verdict}: it generates {with_interval(rate)} times as many tokens per second as the target alone.",
        f"Next: open {report}/report.html. For a target of your own: "
        f'make demo ARGS="target.path=path/to/your-chat-model root=runs/mine"',
    ]
