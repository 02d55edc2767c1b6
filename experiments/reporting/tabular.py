"""A table that can be written as Markdown and as LaTeX."""

import re
from math import isnan
from pathlib import Path
from typing import NamedTuple

from drafter.artifacts.manifest import write_text
from drafter.metrics import Estimate

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "τ": r"$\tau$", "γ": r"$\gamma$", "α": r"$\alpha$",
    "−": "$-$", "·": r"$\cdot$", "×": r"$\times$", "…": r"\dots{}", "–": "--",
}  # fmt: skip


LEAST_PROMPTS = 5  # a bootstrap over fewer prompts gives an interval that is far too narrow


class Table(NamedTuple):
    """A table.

    Attributes:
        name: the name of its files, and its label in LaTeX.
        title: the caption.
        columns: the names of the columns.
        rows: the cells; a blank cell was not run.
        note: a sentence under the table.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def write(self, folder: Path) -> None:
        """Write the table with its title into a folder, as Markdown and as LaTeX."""
        write_text(folder / f"{self.name}.md", f"### {self.title}\n\n{self.markdown()}\n")
        write_text(folder / f"{self.name}.tex", self.latex())

    def markdown(self) -> str:
        """Return the table and its note in Markdown, without the title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table

    def latex(self) -> str:
        """Return a LaTeX table environment that needs the package booktabs."""

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
    """Return how many columns come before the first one that has numbers."""
    for column in range(len(table.columns)):
        if any(re.match(r"[*+−-]*\d", row[column]) for row in table.rows):
            return column
    return len(table.columns)


def escaped(text: str) -> str:
    """Return a cell's text in LaTeX; **bold** becomes bold type."""
    text = "".join(LATEX.get(letter, letter) for letter in text)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def with_interval(value: Estimate | None, signed: bool = False) -> str:
    """Return an estimate with its interval, such as "2.31 [2.20, 2.44]"; "" for None and NaN."""
    if value is None or isnan(value.value):
        return ""
    sign = "+" if signed else ""
    return f"{value.value:{sign}.2f} [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"


def with_interval_of(value: Estimate, prompts: int | None) -> str:
    """Return an estimate with its interval over prompts, and without it if they are fewer than LEAST_PROMPTS.

    >>> value = Estimate(2.31, 2.20, 2.44)
    >>> with_interval_of(value, 16), with_interval_of(value, 2)
    ('2.31 [2.20, 2.44]', '2.31')

    Args:
        value: the estimate.
        prompts: the number of prompts that were resampled; None if it is not known.
    """
    if prompts is not None and prompts < LEAST_PROMPTS and not isnan(value.value):
        return f"{value.value:.2f}"
    return with_interval(value)


def number(value: float) -> str:
    """Return a number of parameters, tokens or the like in short form: "6.74B", "115M", "158k"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
