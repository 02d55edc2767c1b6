"""Draw the figures of the reports, each as PNG and SVG: block efficiency, validation curves, gammas and trimming."""

import textwrap
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from drafter.metrics import Estimate
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.identity import PRETRAINED
from experiments.reporting.results import ResultRow, sorted_gammas
from experiments.reporting.trim_page import TrimRow

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is faint on white.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8C510A", "#4B0092"]
# A loss has the same colour in every figure; the pretrained drafter is grey.
KNOWN = dict(zip(("kld", "tvd", "tvdpp", "nla", "jsd", "rkl", "ce", "lk_hybrid", "hit"), PALETTE, strict=True))
# For series of other names, where the colours of losses that are absent do not suffice.
FURTHER = ["#999933", "#882255", "#DDCC77", "#44AA99"]
YARDSTICKS = {
    "val/acceptance_rate": "acceptance rate α (higher is better)",
    "val/kld": "KLD, nats (lower is better)",
    "val/argmax_agreement": "argmax agreement (higher is better)",
    "val/block_efficiency_greedy": "τ, greedy responses, without decoding",
    "val/block_efficiency_sampled": "τ, sampled responses, without decoding",
}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def colours(series: Sequence[str]) -> dict[str, str]:
    """Return a colour for each series; that of a known loss is the same in every figure."""
    others = sorted(one for one in series if one != PRETRAINED and one not in KNOWN)
    free = [colour for loss, colour in KNOWN.items() if loss not in series] + FURTHER
    return KNOWN | {PRETRAINED: "#999999"} | {one: free[i % len(free)] for i, one in enumerate(others)}


def draw_efficiency(rows: Sequence[ResultRow], path: Path) -> str:
    """Draw bars of block efficiency with 95% intervals, one panel per gamma. Returns the SVG's text."""
    names, tasks = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("series", "task"))
    gammas = sorted_gammas(row.gamma for row in rows)
    colour, width = colours(names), 0.8 / len(names)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(gammas), figsize=((1 + 0.95 * len(tasks)) * len(gammas), 3.6), sharey=True, squeeze=False
        )
        for axis, gamma in zip(axes[0], gammas, strict=True):
            axis.grid(axis="x", visible=False)
            for offset, series in enumerate(names):
                found = {row.task: row.block_efficiency for row in rows if (row.series, row.gamma) == (series, gamma)}
                shown = [i for i, task in enumerate(tasks) if task in found]
                values = np.array([found[tasks[i]] for i in shown]).reshape(-1, 3)
                errors = np.abs(values[:, 1:] - values[:, :1]).T
                centres = np.array(shown) + (offset - (len(names) - 1) / 2) * width
                axis.bar(centres, values[:, 0], width * 0.92, label=series, color=colour[series])
                axis.errorbar(centres, values[:, 0], errors, fmt="none", ecolor="#333333", elinewidth=1)
            axis.set_xticks(range(len(tasks)), [textwrap.fill(task.replace("_", " "), 10) for task in tasks])
            axis.set_title(f"γ = {gamma}")
            axis.axhline(1, color="#333333", linewidth=0.8)
        axes[0][0].set_ylabel("block efficiency τ")
        # The handles are made here, because a series that was not run at the first gamma has no bar to copy.
        handles = [Patch(facecolor=colour[series], label=series) for series in names]
        add_legend(figure, handles)
        return _save(figure, path)


def draw_curves(curves: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> str:
    """Draw each yardstick along finetuning: a line per series, the mean of its seeds, and a band over their range.

    Args:
        curves: series -> seed -> validation rows (see results.read_curves).
        path: of both files, without the suffix.

    Returns:
        The SVG's text.
    """
    colour = colours(list(curves))
    logged = [row for seeds in curves.values() for rows in seeds.values() for row in rows]
    shown = {key: title for key, title in YARDSTICKS.items() if all(key in row for row in logged)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(shown), figsize=(3.7 * len(shown), 3.4), squeeze=False)
        for axis, (key, title) in zip(axes[0], shown.items(), strict=True):
            for series, seeds in curves.items():
                shared = min(len(rows) for rows in seeds.values())
                steps = [row["step"] for row in next(iter(seeds.values()))[:shared]]
                values = np.array([[row[key] for row in rows[:shared]] for rows in seeds.values()])
                axis.plot(steps, values.mean(0), color=colour[series], label=series, linewidth=1.8)
                axis.fill_between(steps, values.min(0), values.max(0), color=colour[series], alpha=0.2, linewidth=0)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("finetuning step")
        add_legend(figure, axes[0][0].get_legend_handles_labels()[0])
        return _save(figure, path)


def draw_along(found: dict[str, dict[str, list[tuple[int, Estimate]]]], path: Path) -> str:
    """Draw block efficiency along finetuning, a panel per task (paper.efficiency_by_step). Returns the SVG's text."""
    colour = colours(list(found))
    tasks = list(dict.fromkeys(task for lines in found.values() for task in lines))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.2), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            for number, (series, lines) in enumerate(found.items()):
                steps, values = zip(*lines[task], strict=True)
                value, low, high = np.array(values).T
                shift = (number - (len(found) - 1) / 2) * 0.008 * max(steps)  # keeps intervals side by side
                axis.errorbar(
                    np.array(steps) + shift,
                    value,
                    (value - low, high - value),
                    color=colour[series],
                    label=series,
                    linewidth=1.6,
                    elinewidth=0.8,
                    marker="o",
                    markersize=3,
                )
            axis.set_title(task.replace("_", " "))
            axis.set_xlabel("finetuning step")
        axes[0][0].set_ylabel("block efficiency τ")
        add_legend(figure, axes[0][0].get_legend_handles_labels()[0])
        return _save(figure, path)


def draw_gammas(rows: Sequence[GammaRow], path: Path) -> str:
    """Draw the predicted and the measured speed-up at each gamma, one panel per task. Returns the SVG's text."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.2), sharey=True, squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            of_task = [row for row in rows if row.task == task]
            gammas = [row.gamma for row in of_task]
            decoded = [row.gamma for row in of_task if row.measured]
            value, low, high = np.array([row.measured for row in of_task if row.measured]).T
            axis.plot(gammas, [row.predicted for row in of_task], color=PALETTE[0], label="predicted")
            axis.errorbar(decoded, value, (value - low, high - value), fmt="o", color=PALETTE[5], label="measured")
            axis.axhline(1, color="#333333", linewidth=0.8)
            axis.set_title(task.replace("_", " "))
            axis.set_xlabel("γ")
            axis.set_xticks(gammas)
        axes[0][0].set_ylabel("speed-up over the target alone")
        axes[0][0].set_ylim(bottom=0)
        add_legend(figure, axes[0][0].get_legend_handles_labels()[0])
        return _save(figure, path)


def draw_trimming(rows: Sequence[TrimRow], path: Path) -> str:
    """Draw MBSU and block efficiency by the number of tokens that the head keeps. Returns the SVG's text."""
    sizes = [row.tokens for row in rows]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.2))
        for axis, field in zip(axes, ("speedup", "block_efficiency"), strict=True):
            value, low, high = np.array([getattr(row, field) for row in rows]).T
            axis.errorbar(sizes, value, [value - low, high - value], color=KNOWN["tvdpp"], marker="o", capsize=3)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_xlabel("tokens that the head keeps")
            axis.set_title({"speedup": "MBSU", "block_efficiency": "block efficiency τ"}[field], fontsize=10)
        return _save(figure, path)


def add_legend(figure: plt.Figure, handles: Sequence[Any]) -> None:
    """Put a legend above the panels, in as many columns as the figure has room for."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = int(figure.get_figwidth() / (0.6 + 0.085 * longest))  # inches of a marker and of a character
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, min(columns, len(handles))), frameon=False)


def _save(figure: plt.Figure, path: Path) -> str:
    """Save a figure as PNG and SVG, and close it. Returns the SVG's text without the XML declaration."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"))
    text = StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
