"""A table, as Markdown and as LaTeX."""

import re
from typing import NamedTuple

from drafter.metrics import Estimate

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "τ": r"$\tau$", "γ": r"$\gamma$", "α": r"$\alpha$",
    "−": "$-$", "·": r"$\cdot$", "×": r"$\times$", "…": r"\dots{}", "–": "--",
}  # fmt: skip


class Table(NamedTuple):
    """A title, the columns' names, rows of cells (blank: not run), and what a reader has to know."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table and its note, without its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table

    def latex(self) -> str:
        """A table environment for the package booktabs."""

        def line(cells: list[str]) -> str:
            return " & ".join(map(escaped, cells)) + r" \\"

        body = [line(self.columns), r"\midrule", *map(line, self.rows)]
        align = "l" * labels(self) + "r" * (len(self.columns) - labels(self))
        stop = "" if self.title.endswith("?") else "."
        caption = escaped(f"{self.title}{stop} {self.note}" if self.note else self.title)
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{align}}}",
                r"\toprule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def labels(table: Table) -> int:
    """How many of the first columns are words, and not numbers."""
    for place in range(len(table.columns)):
        if any(re.match(r"[*+−-]*\d", row[place]) for row in table.rows):
            return place
    return len(table.columns)


def escaped(text: str) -> str:
    """A cell's text as LaTeX shows it; **bold** stays bold."""
    text = "".join(LATEX.get(letter, letter) for letter in text)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def with_interval(value: Estimate | None, signed: bool = False) -> str:
    """2.31 [2.20, 2.44]; blank for None."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    return f"{value.value:{sign}.2f} [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"


def number(value: float) -> str:
    """6.74B, 115M, 158k"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
