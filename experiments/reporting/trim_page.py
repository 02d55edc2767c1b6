"""The page that says how many tokens a drafter's head should keep: a row for each size, and the verdict."""

from typing import NamedTuple

from drafter.metrics import Estimate
from experiments.reporting.tabular import Table, with_interval


class TrimRow(NamedTuple):
    """A head with `tokens` rows, over the tasks in the domain: coverage, size, and the measured figures."""

    tokens: int
    coverage: float
    size_ratio: float
    acceptance_rate: Estimate
    block_efficiency: Estimate
    speedup: Estimate
    gain: Estimate | None
    token_rate_ratio: Estimate


def trim_page(rows: list[TrimRow], best: TrimRow, drafter: str, gamma: int) -> str:
    """Return the page in Markdown: a row for each size, and which size has the highest memory-bound speed-up."""
    columns = ["tokens kept", "of the target's words", "c", "α", "τ", "MBSU", "MBSU − whole", "token rate"]
    lines = [
        [
            str(row.tokens),
            f"{row.coverage:.1%}",
            f"{row.size_ratio:.2%}",
            *map(with_interval, (row.acceptance_rate, row.block_efficiency, row.speedup)),
            with_interval(row.gain, signed=True) if row.gain else "",
            with_interval(row.token_rate_ratio),
        ]
        for row in rows
    ]
    whole = max(row.tokens for row in rows)
    verdict = f"A head of {best.tokens} of {whole} tokens has the highest MBSU, and is what this directory has."
    if best.tokens == whole:
        verdict = "No trimmed head has a higher MBSU than the whole one, so this directory has the whole one."
    title = f"Heads of {drafter}, tasks in the domain, γ = {gamma}"
    notes = (
        "c counts no row that the head lost. Of the target's words: held-out response tokens that the head can draft. "
        "In brackets: 95% bootstrap intervals over prompts, the differences paired."
    )
    table = Table("trim", title, columns, lines, notes)
    return f"# {table.title}\n\n{verdict}\n\n{table.markdown()}\n"
