"""Write the page on how many tokens a drafter's head should keep: one row per size, and which size is best."""

from typing import NamedTuple

from drafter.metrics import Estimate
from experiments.reporting.tabular import Table, with_interval


class TrimRow(NamedTuple):
    """The results of a head that keeps some of the tokens, over the tasks in the domain.

    Attributes:
        tokens: how many tokens the head keeps.
        coverage: the share of held-out response tokens that the head can draft.
        size_ratio: c, the drafter's parameters divided by the target's, without the rows that the head lost.
        acceptance_rate: α.
        block_efficiency: τ.
        speedup: MBSU.
        gain: MBSU minus that of the whole head; None for the whole head.
        token_rate_ratio: tokens per second relative to the target alone.
    """

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
    columns = ["tokens kept", "coverage", "c", "α", "τ", "MBSU", "MBSU − whole", "token rate"]
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
    verdict = f"A head of {best.tokens} of {whole} tokens has the highest MBSU. The drafter in this directory has it."
    if best.tokens == whole:
        verdict = "No trimmed head has a higher MBSU than the whole head, which the drafter in this directory has."
    title = f"Heads of {drafter}, tasks in the domain, γ = {gamma}"
    notes = (
        "c is without the rows that the head lost. Coverage is the share of held-out response tokens that the head "
        "can draft. In brackets: 95% bootstrap intervals over prompts; differences are paired by prompt."
    )
    table = Table("trim", title, columns, lines, notes)
    return f"# {table.title}\n\n{verdict}\n\n{table.markdown()}\n"
