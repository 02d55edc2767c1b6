"""Say which tasks' answers often reach their limit: the counts then describe beginnings of answers."""

from collections import Counter

from drafter.artifacts.manifest import read_manifest
from experiments.reporting.results import Evaluation

SHARE = 0.1  # of a task's answers that reach the limit; a larger one is mentioned


def describe_cut_answers(evaluations: list[Evaluation]) -> list[str]:
    """Return a note on the tasks of which more than a tenth of the answers have max_new_tokens tokens, if any."""
    answers, cut = Counter[str](), Counter[str]()
    limits: dict[str, int] = {}
    for evaluation in evaluations:
        tasks = read_manifest(evaluation.directory, "evaluate")["settings"]["tasks"]
        limits |= {task: how["max_new_tokens"] for task, how in tasks.items() if "max_new_tokens" in how}
        for (task, _, _), counts in evaluation.counts.items():
            answers[task] += 1
            cut[task] += counts.tokens >= limits.get(task, float("inf"))
    found = {task: cut[task] / answers[task] for task in answers if cut[task] > SHARE * answers[task]}
    if not found:
        return []
    shares = ", ".join(f"{share:.0%} of {task.replace('_', ' ')} ({limits[task]})" for task, share in found.items())
    return [
        f"Answers that reached max_new_tokens: {shares}. The numbers describe how these answers begin; of a thinking "
        f"model, mostly its thinking. Raise task.<name>.max_new_tokens to measure whole answers."
    ]
