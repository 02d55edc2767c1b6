"""The command `trim` on a finished run: what it writes, what it refuses, and how the other commands take the result."""

import json

import pytest

from drafter.artifacts.manifest import read_manifest
from drafter.models.trimming import read_kept, write_kept
from tests.experiments.test_pipeline import stage

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def trimmed(world, tmp_path_factory):
    overrides, root = world
    out = tmp_path_factory.mktemp("trim")
    drafter = root / "finetune" / "kld-seed1"
    command = [*overrides, f"out={out}", f"trim.drafter={drafter}", "trim.sizes=[4,12]"]
    stage("trim", command)
    return command, out / drafter.name


def test_trim_writes_a_drafter_a_table_and_a_figure(trimmed):
    _, out = trimmed
    rows = [json.loads(line) for line in (out / "trim.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [4, 12, 24]
    ratios, coverage = ([row[name] for row in rows] for name in ("size_ratio", "coverage"))
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]
    assert coverage == sorted(coverage)
    assert coverage[-1] == 1
    for row in rows:
        assert row["speedup"][0] == pytest.approx(row["block_efficiency"][0] / (1 + 3 * row["size_ratio"]))
    for row in rows[:-1]:
        assert row["gain"][0] == pytest.approx(row["speedup"][0] - rows[-1]["speedup"][0])
    assert rows[-1]["gain"] is None
    best = max(rows, key=lambda row: row["speedup"][0])["tokens"]
    assert (read_kept(out) is None) if best == 24 else (len(read_kept(out)) == best)
    assert (out / "trim.png").exists()
    assert f"| {rows[0]['tokens']} |" in (out / "trim.md").read_text()


def test_the_trimmed_drafter_is_evaluated_under_its_own_name(trimmed, tmp_path):
    command, out = trimmed
    common = [override for override in command if not override.startswith(("out=", "trim."))]
    stage("evaluate", [*common, f"out={tmp_path}", f"drafters=['{out}']"])
    counts = read_manifest(tmp_path / out.name, "evaluate")["counts"]
    assert (counts["series"], counts["loss"], counts["seed"]) == ("kld-trimmed", "kld", 1)
    assert counts["greedy_outputs_unlike_the_target"] == 0 < counts["greedy_outputs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trim.sizes=[]", "trim.sizes is"),
        ("trim.sizes=[0]", "trim.sizes is"),
        ("trim.drafter={out}", "trimmed already"),
    ],
)
def test_invalid_sizes_and_trimmed_drafters_are_refused(trimmed, tmp_path, change, message):
    command, _ = trimmed
    if "{out}" in change:
        write_kept(tmp_path, [1])
    with pytest.raises(ValueError, match=message):
        stage("trim", [*command, f"out={tmp_path}/new", change.format(out=tmp_path)])
