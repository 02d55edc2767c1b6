"""The figures of the report: block efficiency by task and loss, and validation curves. Each as PNG and SVG."""

import textwrap
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from drafter.metrics import Estimate
from experiments.reporting.gamma_page import GammaRow
from experiments.reporting.results import Row, in_order
from experiments.reporting.trim_page import TrimRow

# Okabe and Ito's palette, which colour-blind readers tell apart, without its yellow, which is faint on white.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8C510A"]
# A loss has its colour whatever else is shown; the pretrained drafter is grey.
KNOWN = dict(zip(("kld", "tvd", "tvdpp", "nla", "jsd", "rkl", "ce", "lk_hybrid"), PALETTE, strict=True))
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


def colours(losses: Sequence[str]) -> dict[str, str]:
    """One colour a loss, the same in every figure."""
    others = sorted(loss for loss in losses if loss != "pretrained" and loss not in KNOWN)
    free = [colour for loss, colour in KNOWN.items() if loss not in losses] or PALETTE
    return KNOWN | {"pretrained": "#999999"} | {loss: free[i % len(free)] for i, loss in enumerate(others)}


def draw_efficiency(rows: Sequence[Row], path: Path) -> str:
    """Bars of block efficiency with 95% intervals, a panel for each gamma; the SVG's text."""
    losses, tasks = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("loss", "task"))
    gammas = in_order(row.gamma for row in rows)
    colour, width = colours(losses), 0.8 / len(losses)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(gammas), figsize=((1 + 0.95 * len(tasks)) * len(gammas), 3.6), sharey=True, squeeze=False
        )
        for axis, gamma in zip(axes[0], gammas, strict=True):
            axis.grid(axis="x", visible=False)
            for offset, loss in enumerate(losses):
                of_loss = {row.task: row.block_efficiency for row in rows if (row.loss, row.gamma) == (loss, gamma)}
                shown = [i for i, task in enumerate(tasks) if task in of_loss]
                values = np.array([of_loss[tasks[i]] for i in shown]).reshape(-1, 3)
                errors = np.abs(values[:, 1:] - values[:, :1]).T
                places = np.array(shown) + (offset - (len(losses) - 1) / 2) * width
                axis.bar(places, values[:, 0], width * 0.92, label=loss, color=colour[loss])
                axis.errorbar(places, values[:, 0], errors, fmt="none", ecolor="#333333", elinewidth=1)
            axis.set_xticks(range(len(tasks)), [textwrap.fill(task.replace("_", " "), 10) for task in tasks])
            axis.set_title(f"γ = {gamma}")
            axis.axhline(1, color="#333333", linewidth=0.8)
        axes[0][0].set_ylabel("block efficiency τ")
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(losses), frameon=False
        )
        return _save(figure, path)


def draw_curves(curves: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> str:
    """Each yardstick along finetuning: a line a loss (the mean of its seeds), a band from the least to the most."""
    colour = colours(list(curves))
    logged = [row for seeds in curves.values() for rows in seeds.values() for row in rows]
    shown = {key: title for key, title in YARDSTICKS.items() if all(key in row for row in logged)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(shown), figsize=(3.7 * len(shown), 3.4), squeeze=False)
        for axis, (key, title) in zip(axes[0], shown.items(), strict=True):
            for loss, seeds in curves.items():
                shared = min(len(rows) for rows in seeds.values())
                steps = [row["step"] for row in next(iter(seeds.values()))[:shared]]
                values = np.array([[row[key] for row in rows[:shared]] for rows in seeds.values()])
                axis.plot(steps, values.mean(0), color=colour[loss], label=loss, linewidth=1.8)
                axis.fill_between(steps, values.min(0), values.max(0), color=colour[loss], alpha=0.2, linewidth=0)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("finetuning step")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
        return _save(figure, path)


def draw_along(found: dict[str, dict[str, list[tuple[int, Estimate]]]], path: Path) -> str:
    """Block efficiency along finetuning, a panel a task and a line a loss (see paper.along); the SVG's text."""
    colour = colours(list(found))
    tasks = list(dict.fromkeys(task for lines in found.values() for task in lines))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.2), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            for number, (loss, lines) in enumerate(found.items()):
                steps, values = zip(*lines[task], strict=True)
                value, low, high = np.array(values).T
                shift = (number - (len(found) - 1) / 2) * 0.008 * max(steps)  # so that intervals lie side by side
                axis.errorbar(
                    np.array(steps) + shift,
                    value,
                    (value - low, high - value),
                    color=colour[loss],
                    label=loss,
                    linewidth=1.6,
                    elinewidth=0.8,
                    marker="o",
                    markersize=3,
                )
            axis.set_title(task.replace("_", " "))
            axis.set_xlabel("finetuning step")
        axes[0][0].set_ylabel("block efficiency τ")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
        return _save(figure, path)


def draw_gammas(rows: Sequence[GammaRow], path: Path) -> str:
    """The speed-up at each gamma, a panel a task: predicted as a line, measured with 95% intervals; the SVG's text."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.2), sharey=True, squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            of_task = [row for row in rows if row.task == task]
            gammas = [row.gamma for row in of_task]
            value, low, high = np.array([row.measured for row in of_task]).T
            axis.plot(gammas, [row.predicted for row in of_task], color=PALETTE[0], label="predicted")
            axis.errorbar(gammas, value, (value - low, high - value), fmt="o", color=PALETTE[5], label="measured")
            axis.axhline(1, color="#333333", linewidth=0.8)
            axis.set_title(task.replace("_", " "))
            axis.set_xlabel("γ")
            axis.set_xticks(gammas)
        axes[0][0].set_ylabel("speed-up over the target alone")
        axes[0][0].set_ylim(bottom=0)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        return _save(figure, path)


def draw_trimming(rows: Sequence[TrimRow], path: Path) -> str:
    """MBSU and block efficiency by the tokens that the head keeps; the SVG's text."""
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


def _save(figure: plt.Figure, path: Path) -> str:
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"))
    text = StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
