"""Write the report as one self-contained HTML page: sortable tables, validation curves, and coloured responses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs  # for plotly.js: the browser recomputes means and redraws at each switch

from drafter.artifacts.manifest import write_text
from experiments.reporting.figures import YARDSTICKS, colours
from experiments.reporting.results import gamma_sort_key
from experiments.reporting.tabular import Table

Curves = dict[str, dict[int, list[dict[str, float]]]]
CAPTIONS = {
    "block_efficiency": "Block efficiency by task and loss",
    "checkpoints": "Block efficiency along finetuning",
}


def write_html(
    path: Path,
    tables: Sequence[Table],
    curves: Curves,
    figures: dict[str, str],
    samples: dict[str, list[dict[str, Any]]],
    notes: list[str],
) -> None:
    """Render report.html.jinja.

    Args:
        path: the file to write.
        tables: the tables of results.md.
        curves: series -> seed -> validation rows (see results.read_curves).
        figures: name -> SVG text.
        samples: drafter -> decoded texts (see evaluation.as_text).
        notes: sentences under the title.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        tables=tables,
        lines=curves_json(curves),
        plotly=get_plotlyjs() if curves else "",
        figures={CAPTIONS[name]: figure for name, figure in figures.items() if name in CAPTIONS},
        samples=group_by_task(samples),
        notes=notes,
    )
    write_text(path, page)


def curves_json(curves: Curves) -> str:
    """Return the data of the page's plots as JSON, escaped for a script element."""
    colour = colours(list(curves))
    data = {
        "yardsticks": [{"key": key, "title": title} for key, title in YARDSTICKS.items()],
        "losses": [
            {
                "name": series,
                "colour": colour[series],
                "seeds": [{"seed": seed, "rows": rows} for seed, rows in seeds.items()],
            }
            for series, seeds in curves.items()
        ],
    }
    return json.dumps(data).replace("<", "\\u003c")


def group_by_task(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the first prompt of each task at the smallest gamma, with every drafter's decoding of it."""
    chosen: dict[str, dict[str, Any]] = {}
    for drafter, texts in samples.items():
        for text in sorted(texts, key=lambda text: gamma_sort_key(text["gamma"])):
            row = chosen.setdefault(text["task"], {**text, "decodings": {}})
            if (text["prompt"], text["gamma"]) == (row["prompt"], row["gamma"]):
                tokens = sum(len(block["accepted"]) + len(block["bonus"]) for block in text["blocks"])
                row["decodings"][drafter] = {"blocks": text["blocks"], "efficiency": tokens / len(text["blocks"])}
    return list(chosen.values())
