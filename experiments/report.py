"""One self-contained HTML page: results, curves, and responses coloured by who wrote each token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from experiments.results import Row, in_order, rank


def write_html(
    path: Path,
    rows: Sequence[Row],
    figures: dict[str, str],
    samples: dict[str, list[dict[str, Any]]],
    notes: list[str],
    base: str = "pretrained",
) -> None:
    """Render report.html.jinja.

    Args:
        rows: the results.
        figures: name -> SVG text.
        samples: drafter -> decoded texts (see evaluate.as_text).
        notes: sentences under the tables.
        base: the drafter that the others are compared with.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        rows=rows,
        tasks=list(dict.fromkeys(row.task for row in rows)),
        gammas=in_order(row.gamma for row in rows),
        figures=figures,
        samples=by_prompt(samples),
        notes=notes,
        base=base,
    )
    path.write_text(page)


def by_prompt(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first text of each task at the smallest gamma, with every drafter's decoding of it."""
    chosen: dict[str, dict[str, Any]] = {}
    for drafter, texts in samples.items():
        for text in sorted(texts, key=lambda text: rank(text["gamma"])):
            row = chosen.setdefault(text["task"], {**text, "decodings": {}})
            if (text["prompt"], text["gamma"]) == (row["prompt"], row["gamma"]):
                tokens = sum(len(block["accepted"]) + len(block["own"]) for block in text["blocks"])
                row["decodings"][drafter] = {"blocks": text["blocks"], "efficiency": tokens / len(text["blocks"])}
    return list(chosen.values())
