"""Write the page of a measured pair in Markdown, HTML and JSON."""

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from drafter.artifacts.manifest import write_json, write_text
from experiments.reporting.engine_section import TITLE, engine_paragraphs, engine_table
from experiments.reporting.measurement import (
    ContextRow,
    Measurement,
    accuracy,
    against_rivals,
    outcome,
    verdict,
    what_would_change,
)
from experiments.reporting.tabular import Table, with_interval

RULES = {"greedy": "temperature 0", "ratio": "`ratio`", "argmax": "`argmax`", "match": "`match`"}


class Section(NamedTuple):
    """A part of the page: its title, paragraphs, a table if there is one, and texts to paste by title."""

    title: str
    paragraphs: Sequence[str]
    table: Table | None = None
    code: Mapping[str, str] = {}


def sections(found: Measurement) -> list[Section]:
    """Return the parts of the page, the verdict first."""
    concluding = [verdict(found), what_would_change(found), against_rivals(found)]
    equal, decodings = found.equal
    texts = f"Greedy text is the target's own in {equal} of {decodings} decodings."
    if equal < decodings:
        texts += " In the others, rounding decided between two nearly equal logits."
    prompt, answer = found.lengths
    how = (
        f"Measured on {found.prompts}: {prompt:.0f} tokens per prompt and {answer:.0f} per greedy answer on average. "
        f"Brackets are 95% intervals over prompts."
    )
    parts = [
        Section(
            f"Is {found.label} worth it for {found.target}?", [*(one for one in concluding if one), f"{texts} {how}"]
        ),
        Section("Compatibility", [*found.compatibility, *found.parameters]),
        speedups(found),
        tau_by_rule(found),
        call_timings(found),
    ]
    if found.batches:
        parts.append(batch_sizes(found))
    if found.engine:
        parts.append(Section(TITLE, engine_paragraphs(found.engine), engine_table(found.engine)))
    if found.contexts:
        parts.append(contexts(found))
    return [*parts, settings(found)]


def speedups(found: Measurement) -> Section:
    """Return the table of all drafters and γ."""
    columns = ["drafter", "γ", "τ", "block, in target calls", "MBSU", "predicted speed-up", "measured"]
    columns.append("predicted / measured")
    cells = [
        [
            row.drafter,
            str(row.gamma),
            f"{row.block_efficiency:.2f}",
            f"{row.cost:.2f}",
            f"{row.memory_bound:.2f}",
            with_interval(row.predicted),
            with_interval(row.measured),
            "" if row.predicted_by_measured is None else f"{row.predicted_by_measured:.2f}",
        ]
        for row in found.rows
    ]
    text = (
        "τ is the number of tokens per target call, as it follows from what the target generates alone. A block costs "
        "cγ + v(γ) target calls with one token; where drafts are proposed without a model, it is the mean over blocks. "
        "The predicted speed-up follows from the two and the time in which prompts are read; its interval leaves out "
        "what the times of calls may vary by. MBSU takes c from the numbers of parameters and v = 1, as if only memory "
        "counted. The measured speed-up is the token rate relative to the target alone, decoded in turn with it. All "
        "of it is greedy."
    )
    return Section("Speed-up", [text, accuracy(found.rows)], Table("speedups", "Speed-up", columns, cells))


def tau_by_rule(found: Measurement) -> Section:
    """Return the table of τ by acceptance rule."""
    columns = ["γ", *(RULES[key] for key in found.by_rule)]
    cells = [
        [str(gamma), *(f"{values[gamma - 1]:.2f}" for values in found.by_rule.values())]
        for gamma in range(1, len(found.calls.verification) + 1)
    ]
    rates = [f"{RULES[key]} {rate:.2f}" for key, rate in found.acceptance_rates.items()]
    text = (
        f"At temperature 0 all acceptance rules are one. The others are at temperature {found.temperature}, predicted "
        f"from what the target generates there."
    )
    if rates:
        text += f" Acceptance rate per token: {', '.join(rates)}."
    return Section("τ by acceptance rule", [text], Table("rules", "τ by acceptance rule", columns, cells))


def call_timings(found: Measurement) -> Section:
    """Return the table of v(γ), and the sentences about c."""
    calls = found.calls
    call = "A drafter call" if found.size_ratio else "Proposing the drafts of a block"
    lines = [
        f"On this machine ({'both models' if calls.compiled else 'no model'} compiled) a target call with one token "
        f"takes {1e3 * calls.target:.2f} ms. {call} takes {1e3 * calls.drafter:.2f} ms: c = {calls.ratio:.2f}. A "
        f"target call with γ + 1 tokens takes v(γ) times as long as one with one token."
    ]
    if calls.widths:
        padded = ", ".join(f"{count} to {width}" for count, width in sorted(calls.widths.items()))
        lines.append(f"Target calls are padded where that is faster: {padded} tokens.")
    if calls.replays:
        lines.append(
            f"The {' and the '.join(calls.replays)} read accepted tokens again after a rejected draft, because of "
            f"their states. The cost of a block includes this."
        )
    cells = [[str(gamma), f"{value:.2f}"] for gamma, value in enumerate(calls.verification, start=1)]
    return Section("Call timings", lines, Table("calls", "Call timings", ["γ", "v(γ)"], cells))


def batch_sizes(found: Measurement) -> Section:
    """Return the table of the best γ by batch size."""
    cells = [
        [
            str(row.batch_size),
            f"{row.ratio:.2f}",
            str(row.gamma) if row.gamma else "none pays",
            f"{row.predicted:.2f}",
            f"{row.measured:.2f}" if row.measured else "above" if row.batch_size == 1 else "not measured",
        ]
        for row in found.batches
    ]
    text = (
        "So many sequences are decoded side by side. τ is the same for each of them; c and v are timed with calls of "
        "that many sequences, and the speed-up is predicted, without the reading of prompts. What is measured, in two "
        "decodings of all prompts and without an interval, has their reading. Where no γ pays it is that of the one "
        "with the highest prediction."
    )
    columns = ["sequences", "c", "best γ", "predicted speed-up", "measured"]
    return Section("Batch sizes", [text], Table("batches", "Batch sizes", columns, cells))


def contexts(found: Measurement) -> Section:
    """Return the table of c, v(γ) and the predicted speed-up by the number of tokens in the cache."""
    columns, cells = ["tokens in the cache", "γ", "c", "v(γ)", "predicted speed-up"], []
    lines = [
        "Calls are timed with so many tokens in the cache; where a model's context ends, with fewer, so that the calls "
        "fit. τ is that of the answers above: it was not measured with long texts, where it may differ, most of all "
        "that of prompt lookup. The speed-up is predicted from the two, without the reading of prompts.",
        f"Best γ: {'; '.join(map(best_at, found.contexts))}.",
    ]
    if found.hardware:
        columns += ["roofline: c", "roofline: v(γ)", "roofline: predicted speed-up"]
        lines.append(
            f"The roofline is that of {found.hardware}: a call takes the time of its arithmetic or of reading weights "
            f"and cache, whichever is longer, and a fixed time per layer. It has the same τ."
        )
    for row in found.contexts:
        for index in range(len(row.predicted)):
            values = [
                f"{value:.2f}"
                for one in (row, row.roofline)
                if one
                for value in (one.ratio, one.verification[index], one.predicted[index])
            ]
            cells.append([f"{row.tokens:,}", str(index + 1), *values])
    return Section("Contexts", lines, Table("contexts", "Contexts", columns, cells))


def best_at(row: ContextRow) -> str:
    """Return the best γ for a number of tokens in the cache as text.

    >>> best_at(ContextRow(8176, 0.2, [1.1, 1.2], [1.2, 1.3], None))
    '8,176 tokens: γ = 2 (1.30)'
    """
    best = f"γ = {row.gamma}" if row.gamma else "none pays"
    return f"{row.tokens:,} tokens: {best} ({max(row.predicted):.2f})"


def settings(found: Measurement) -> Section:
    """Return the table of engines with their settings, and the texts to paste."""
    best = found.best()
    lines = [
        "γ is the one with the highest prediction for the acceptance rule that the engine follows above temperature 0, "
        "as a mean of greedy and sampled answers. The predictions have c and v of this machine and of this project's "
        "loop: an engine has others, and with the same τ another speed-up."
    ]
    if best.measured and outcome(best.measured) != "pays":
        lines.insert(0, "As long as no γ pays, serve the target without this drafter.")
    cells = [
        [
            one.engine,
            f"`{one.rule}`" if one.rule else "temperature 0 alone",
            str(one.gamma),
            f"{one.greedy:.2f}",
            "" if one.sampled is None else f"{one.sampled:.2f}",
        ]
        for one in found.engines
    ]
    columns = ["engine", "acceptance rule", "γ", "predicted, greedy", f"predicted, temperature {found.temperature}"]
    table = Table("engines", "Engines", columns, cells) if cells else None
    code = (
        {} if found.export is None else {"Engines compare what differs here, so export the drafter first": found.export}
    )
    code |= {one.engine: one.lines for one in found.engines}
    return Section("Settings", lines, table, code | by_batch_size(found))


def by_batch_size(found: Measurement) -> dict[str, str]:
    """Return the options of engines with the best γ by batch size by title, where several sizes were timed."""
    options = {}
    if found.speculative_config:
        text = json.dumps(found.speculative_config, ensure_ascii=False)
        options["vLLM, γ by batch size"] = shlex.join(["--speculative-config", text])
    smallest = min(found.batches, key=lambda row: row.batch_size, default=None)
    if smallest and smallest.gamma and any(one.engine.startswith("llama.cpp") for one in found.engines):
        title = f"llama.cpp, one γ for all batch sizes: the best one at {smallest.batch_size}"
        options[title] = f"--spec-draft-n-max {smallest.gamma}"
    return options


def markdown(parts: Sequence[Section]) -> str:
    """Return the page in Markdown."""
    lines = []
    for number, part in enumerate(parts):
        lines += [f"{'##' if number else '#'} {part.title}", "", *(f"{one}\n" for one in part.paragraphs)]
        if part.table:
            lines += [part.table.markdown(), ""]
        for title, text in part.code.items():
            lines += [f"{title}:", "", "```", text, "```", ""]
    return "\n".join(lines)


def write_page(folder: Path, found: Measurement) -> str:
    """Write measure.md, measure.html and measure.json, and return the Markdown."""
    parts = sections(found)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = inline
    page = environment.get_template("measure.html.jinja").render(sections=parts)
    write_text(folder / "measure.md", markdown(parts))
    write_text(folder / "measure.html", page)
    write_json(folder / "measure.json", json_of(found))
    return markdown(parts)


def json_of(found: Measurement) -> dict[str, Any]:
    """Return the fields of a measurement, with the verdict and each row's ratio of predicted to measured speed-up."""
    rows = [{**as_json(row), "predicted_by_measured": row.predicted_by_measured} for row in found.rows]
    return {"verdict": verdict(found), **as_json(found), "rows": rows}


def inline(text: str) -> str:
    """Return a paragraph as HTML, with `code` in a code element.

    >>> inline("`a<b` is 1")
    '<code>a&lt;b</code> is 1'
    """
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))


def as_json(value: Any) -> Any:
    """Return records as dictionaries by field, as JSON has them."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: as_json(one) for name, one in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return json.loads(json.dumps(value))
