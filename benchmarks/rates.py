r"""Draw the token rates of a pair, relative to the target alone, in this project's loop and in other engines.

    python -m benchmarks.rates --gamma 3 --loop 'prompt lookup' 7 runs/smollm2_shipped/gamma_unseen/ngram2-4 \
        --engines 'OpenVINO GenAI=runs/engines/openvino.json' 'llama-server=runs/engines/llama-server.json' --out rates

--loop is the name of a drafter in the figure, its γ and its directory of `experiments.gamma`, of which each task gets a
bar; it can be given several times. --engines are files of `benchmarks.engines` by the names that they get in the
figure, of which all prompts together get a bar, at --gamma.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from drafter.artifacts.manifest import read_jsonl
from drafter.metrics import Estimate
from experiments.reporting.figures import PALETTE, STYLE

NAMES = {"xsum": "XSum", "cnn_dailymail": "CNN/DailyMail", "wmt18_de_en": "WMT18 De-En", "dolly": "Dolly, T = 0.6"}


def main() -> None:
    """Read the rates and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", nargs=3, action="append", required=True, metavar=("NAME", "GAMMA", "DIRECTORY"))
    parser.add_argument("--engines", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--gamma", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the figure's path without its suffix")
    arguments = parser.parse_args()
    bars = [bar for name, gamma, path in arguments.loop for bar in loop_bars(Path(path), int(gamma), name)]
    for one in arguments.engines:
        name, _, path = one.partition("=")
        bars.append(engine_bar(name, Path(path), arguments.gamma))
    draw(bars, arguments.out)


def loop_bars(folder: Path, gamma: int, name: str) -> list[tuple[str, str, Estimate]]:
    """Return the group, the label and the measured rate of each task with the drafter of a name.

    Raises:
        SystemExit: γ was not decoded.
    """
    rows = [row for row in read_jsonl(folder / "gamma.jsonl") if row["gamma"] == gamma and row["measured"]]
    if not rows:
        raise SystemExit(f"{folder} has no measured row at γ = {gamma}")
    return [
        (name, f"{name}, γ = {gamma}: {NAMES.get(row['task'], row['task'])}", Estimate(*row["measured"]))
        for row in rows
    ]


def engine_bar(name: str, path: Path, gamma: int) -> tuple[str, str, Estimate]:
    """Return the group, the label and the rate of all prompts of an engine.

    Raises:
        SystemExit: γ was not measured.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["summaries"]
    found = [row for row in rows if row["task"] == "all" and row["gamma"] == gamma]
    if not found:
        raise SystemExit(f"{path} has no row of all prompts at γ = {gamma}")
    return name, f"{name}, γ = {gamma}: {found[0]['prompts']} prompts", Estimate(**found[0]["ratio"])


def draw(bars: list[tuple[str, str, Estimate]], path: Path) -> None:
    """Draw a horizontal bar for each rate, in the colour of its group, with its interval."""
    groups = list(dict.fromkeys(group for group, *_ in bars))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 0.42 * len(bars) + 0.9))
        axis.grid(axis="y", visible=False)
        for place, (group, _, rate) in enumerate(bars):
            errors = [[rate.value - rate.low], [rate.high - rate.value]]
            axis.barh(place, rate.value, 0.72, color=PALETTE[groups.index(group)])
            axis.errorbar(rate.value, place, xerr=errors, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=3)
            axis.text(rate.high + 0.02, place, f"{rate.value:.2f}", va="center")
        axis.axvline(1, color="#333333", linewidth=1)
        axis.set_yticks(range(len(bars)), [label for _, label, _ in bars])
        axis.invert_yaxis()
        axis.set_xlim(0, max(rate.high for *_, rate in bars) + 0.2)
        axis.set_xlabel("token rate, relative to the target alone")
        axis.set_axisbelow(True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".png"), dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main()
