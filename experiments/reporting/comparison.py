"""Read the expected blocks of compared drafters, and make the tables of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drafter.artifacts.manifest import MANIFEST, ArtifactError, read_jsonl, read_manifest
from drafter.metrics import Counts, Estimate, by_prompt, conversation_and_turn, estimate, paired_difference
from experiments.reporting.identity import (
    PRETRAINED,
    DrafterIdentity,
    read_fields,
    read_record_of_run,
    with_distinct_series,
)
from experiments.reporting.tabular import Table, with_interval

ANY = "any"  # the acceptance rule at temperature 0, where all are the same
# Which rule engines follow above temperature 0; docs/SERVING.md has the sources.
ENGINES = {
    "ratio": "transformers; vLLM with `probabilistic` at top-p 1; this project",
    "argmax": "vLLM by default, SGLang, TensorRT-LLM, llama.cpp",
    "match": "mlx-lm",
    ANY: "every engine",
}
METHOD = (
    "τ is the expected number of tokens per target call, computed in teacher forcing on what the target wrote, without "
    "decoding; all drafters have the same responses. In brackets: 95% bootstrap intervals over instructions."
)


class Setting(NamedTuple):
    """How drafts are verified: the temperature, the acceptance rule and γ."""

    temperature: float
    rule: str
    gamma: int

    def order(self) -> tuple[float, int, int]:
        """Return a sort key: the temperature, the rule in the order of ENGINES, γ."""
        return self.temperature, list(ENGINES).index(self.rule), self.gamma

    def title(self) -> str:
        """Return it as the head of a column, without γ."""
        return "greedy" if self.rule == ANY else f"T = {self.temperature:g}, `{self.rule}`"


class Compared(NamedTuple):
    """One drafter, and for each setting its counts by instruction.

    Attributes:
        drafter: which drafter it is.
        counts: setting -> instruction -> counts.
        responses: how many responses it was judged on.
        top_p: that of the responses' sampling, with which the drafter's distributions were cut, too; None: unknown.
        kinds: instruction -> its kind.
    """

    drafter: DrafterIdentity
    counts: Mapping[Setting, Mapping[str, Counts]]
    responses: int
    top_p: float | None = None
    kinds: Mapping[str, str] = {}


def check_alike(folder: Path, settings: Mapping[str, Any], cache: str) -> None:
    """Check that the drafters in a folder were compared as those will be that are added to it.

    Args:
        folder: has a directory for each drafter; it need not exist.
        settings: those of the comparison.
        cache: the fingerprint of its responses.

    Raises:
        ArtifactError: a drafter was compared on other responses or with other settings; names both.
    """
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = read_manifest(path.parent, "compare")
        for what, found, wanted in (
            ("responses", manifest["inputs"]["cache"], cache),
            ("settings", manifest["settings"], dict(settings)),
        ):
            if found != wanted:
                raise ArtifactError(
                    f"{path.parent} was compared with other {what} ({found}, and here they are {wanted}), so that one "
                    f"table cannot have both: give another directory as `out`, or remove that one"
                )


def read_compared(folder: Path) -> list[Compared]:
    """Return the drafters whose expected blocks were counted in a folder, sorted by series, step and seed.

    The kept steps of a finetuning are series of their own, and so are drafters that only have the same name.

    Raises:
        ArtifactError: there is none.
    """
    found, directories = [], []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        summary = read_manifest(path.parent, "compare")["counts"]
        counts: dict[Setting, dict[str, list[Counts]]] = {}
        rows = read_jsonl(path.parent / "counts.jsonl")
        for row in rows:
            setting = Setting(row["temperature"], row.get("rule", ANY), row["gamma"])
            one = Counts(row["tokens"], row["blocks"])
            counts.setdefault(setting, {}).setdefault(row["prompt"], []).append(one)
        summed = {
            setting: {prompt: Counts(*np.sum(several, axis=0).tolist()) for prompt, several in of_prompt.items()}
            for setting, of_prompt in counts.items()
        }
        identity, kinds = read_fields(summary, path.parent), {row["prompt"]: row["kind"] for row in rows}
        found.append(Compared(identity, summed, summary["responses"], summary["top_p"], kinds))
        directories.append(path.parent)
    if not found:
        raise ArtifactError(f"no drafter was compared in {folder}: run `python -m experiments.compare` first")
    identities = [one.drafter._replace(series=series_of_step(one.drafter)) for one in found]
    named = zip(found, with_distinct_series(identities, directories), strict=True)
    ordered = sorted(named, key=lambda pair: order(pair[0].drafter))
    return [one._replace(drafter=drafter) for one, drafter in ordered]


def series_of_step(drafter: DrafterIdentity) -> str:
    """Return the series of a drafter, with the step at which it was kept."""
    return drafter.series if drafter.step is None else f"{drafter.series}, step {drafter.step}"


def order(drafter: DrafterIdentity) -> tuple[bool, str, bool, int, int]:
    """Return a sort key: the pretrained drafter first; then by series, step, of which the end is the last, and seed."""
    pretrained, is_end = drafter.series == PRETRAINED, drafter.step is None
    return not pretrained, drafter.series, is_end, drafter.step or 0, drafter.seed or 0


def comparison_tables(compared: Sequence[Compared], yardsticks: Sequence[str]) -> list[Table]:
    """Return for each γ a table of τ, one of differences to each yardstick and, of trained drafters, one of the best.

    Args:
        compared: the drafters.
        yardsticks: the series that the others are compared with; those that are not there are left out.
    """
    settings = sorted(compared[0].counts, key=Setting.order)
    series = list(dict.fromkeys(one.drafter.series for one in compared))
    known = [name for name in yardsticks if name in series]
    tables = []
    for gamma in sorted({setting.gamma for setting in settings}):
        chosen = [setting for setting in settings if setting.gamma == gamma]
        columns = [setting.title() for setting in chosen]
        values = {name: [efficiency(compared, name, setting) for setting in chosen] for name in series}
        best = [max(values[name][column].value for name in series) for column in range(len(chosen))]
        rows = [[name, str(len(of_series(compared, name))), *map(bold_if, values[name], best)] for name in series]
        tables.append(Table(f"compare_gamma_{gamma}", f"Expected τ, γ = {gamma}", ["drafter", "seeds", *columns], rows))
        for base in known:
            rows = [
                [name, *(with_interval(difference(compared, name, base, setting), signed=True) for setting in chosen)]
                for name in series
                if name != base
            ]
            title = f"Difference of expected τ to {base}, γ = {gamma}"
            tables.append(Table(f"compare_gamma_{gamma}_{base}", title, ["drafter", *columns], rows))
        if trained := {
            name: values[name] for name in series if any(one.drafter.loss for one in of_series(compared, name))
        }:
            tables.append(best_table(compared, known, chosen, trained))
    return tables


def best_table(
    compared: Sequence[Compared],
    yardsticks: Sequence[str],
    settings: Sequence[Setting],
    trained: Mapping[str, Sequence[Estimate]],
) -> Table:
    """Return for each setting the trained series with the highest τ, and by how much it leads the yardsticks.

    Args:
        compared: the drafters.
        yardsticks: the series that the best one is compared with.
        settings: the settings of one γ.
        trained: trained series -> its τ in each setting.
    """
    rows = []
    for number, setting in enumerate(settings):
        best = max(trained, key=lambda name: trained[name][number].value)
        row = [ENGINES[setting.rule], setting.title(), best, with_interval(trained[best][number])]
        rows.append([*row, *(lead(difference(compared, best, base, setting)) for base in yardsticks)])
    gamma = settings[0].gamma
    note = "The best of several is chosen on these responses, which favours it a little. " + METHOD
    varied = any(one.drafter.variant or one.drafter.kinds for one in compared if one.drafter.series in trained)
    what = "drafter" if varied else "loss"  # drafters trained on other data differ in more than their loss
    columns = ["engine", "verification", f"best {what}", "τ", *(f"over {base}" for base in yardsticks)]
    return Table(f"compare_gamma_{gamma}_engines", f"Which {what} for which engine? γ = {gamma}", columns, rows, note)


def lead(value: Estimate | None) -> str:
    """Return by how much the best series leads another, or that no difference was seen."""
    if value is None:
        return ""
    return with_interval(value, signed=True) if value.low > 0 else f"no difference seen ({with_interval(value, True)})"


def bold_if(value: Estimate, best: float) -> str:
    """Return an estimate with its interval, in bold if it is the best one."""
    return f"**{with_interval(value)}**" if value.value == best else with_interval(value)


def of_series(compared: Sequence[Compared], series: str) -> list[Compared]:
    """Return the drafters of one series: its seeds."""
    return [one for one in compared if one.drafter.series == series]


def counts_of(compared: Sequence[Compared], series: str, setting: Setting) -> dict[str, np.ndarray]:
    """Return the counts by instruction of a series, summed over its seeds."""
    pairs = [pair for one in of_series(compared, series) for pair in one.counts[setting].items()]
    return by_prompt([prompt for prompt, _ in pairs], [counts for _, counts in pairs])


def efficiency(compared: Sequence[Compared], series: str, setting: Setting) -> Estimate:
    """Return the expected τ of a series."""
    return estimate(counts_of(compared, series, setting), "block_efficiency")


def difference(compared: Sequence[Compared], series: str, base: str, setting: Setting) -> Estimate | None:
    """Return how much higher the expected τ of one series is than of another; None for the same series."""
    if series == base:
        return None
    ours, theirs = (counts_of(compared, name, setting) for name in (series, base))
    return paired_difference(ours, theirs, "block_efficiency")


def of_kind(compared: Sequence[Compared], kind: str) -> list[Compared]:
    """Return the drafters with the counts of the instructions of one kind, in the settings that have any."""
    found = []
    for one in compared:
        counts = {
            setting: {prompt: number for prompt, number in of_prompt.items() if one.kinds[prompt] == kind}
            for setting, of_prompt in one.counts.items()
        }
        found.append(one._replace(counts={setting: chosen for setting, chosen in counts.items() if chosen}))
    return found


def describe(first: Compared) -> str:
    """Say how much text a drafter was judged on, by temperature."""
    parts = []
    one_by_temperature = {setting.temperature: setting for setting in sorted(first.counts)}
    for temperature, setting in one_by_temperature.items():
        counts = first.counts[setting]
        tokens = sum(one.tokens for one in counts.values())
        instructions = len({conversation_and_turn(prompt)[0] for prompt in counts})
        parts.append(f"{instructions} instructions, {tokens:,.0f} tokens at T = {temperature:g}")
    return "; ".join(parts)


def comparison_page(compared: Sequence[Compared], tables: Sequence[Table]) -> str:
    """Return all tables as one page of Markdown."""
    first = compared[0]
    top_p = "" if first.top_p is None else f", with top-p {first.top_p:g} above T = 0"
    amount = f"{first.responses:,} responses{top_p}: {describe(first)}."
    return "\n\n".join(["# Drafters compared", METHOD, amount, *map(section, tables)]) + "\n"


def kinds_page(compared: Sequence[Compared], yardsticks: Sequence[str]) -> str:
    """Return the same tables for each kind of instruction as one page of Markdown; empty if all are of one kind."""
    kinds = sorted(set(compared[0].kinds.values()))
    if len(kinds) < 2:
        return ""
    few = "With fewer than some thirty instructions, an interval is narrower than it should be."
    parts = ["# Drafters compared, by kind of instruction", f"{METHOD} {few}"]
    for kind in kinds:
        chosen = of_kind(compared, kind)
        tables = [section(table, "###") for table in comparison_tables(chosen, yardsticks)]
        parts += [f"## {kind}", f"{describe(chosen[0])}.", *tables]
    return "\n\n".join(parts) + "\n"


def section(table: Table, heading: str = "##") -> str:
    """Return a table under its title, as Markdown."""
    return f"{heading} {table.title}\n\n{table.markdown()}"


def describe_runs(folder: Path) -> str:
    """Return as JSON what made each compared drafter's counts, and the drafter itself where a stage here made it."""
    found = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        found[str(path.parent)] = manifest = read_record_of_run(path)
        made = Path(manifest["counts"]["directory"]) / MANIFEST
        if made.exists():
            found[str(made.parent)] = read_record_of_run(made)
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"
