"""The command `average` on finished finetunings: what it writes, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.artifacts.manifest import read_manifest
from experiments.exporting.recipe import describe_training, manifest_of
from experiments.reporting.identity import identity_of
from tests.experiments.test_pipeline import stage

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def averaged(world, tmp_path_factory):
    overrides, root = world
    out, start = tmp_path_factory.mktemp("average") / "mean", root / "drafter"
    paths = [str(start), str(root / "finetune" / "kld-seed1")]
    stage("average", [*overrides, f"out={out}", f"average.drafters={paths}"])
    return overrides, paths, out


def test_each_weight_is_the_mean(averaged):
    _, paths, out = averaged
    first, second, mean = (load_file(f"{path}/model.safetensors") for path in (*paths, out))
    assert first.keys() == mean.keys()
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)
    assert any(not torch.equal(first[name], mean[name]) for name in mean)


def test_it_is_a_drafter_as_any_other(averaged, tmp_path):
    overrides, _, out = averaged
    assert (identity_of(str(out)).series, identity_of(str(out)).seed) == ("kld-average", 1)
    stage("evaluate", [*overrides, f"out={tmp_path}", f"drafters=['{out}']"])
    counts = read_manifest(tmp_path / out.name, "evaluate")["counts"]
    assert counts["series"] == "kld-average"
    assert counts["greedy_outputs_unlike_the_target"] == 0 < counts["greedy_outputs"]
    told = describe_training(manifest_of(out))
    assert "the mean of those of" in told["weights"]
    assert "kld" in told["distillation loss"]


def test_drafters_that_cannot_be_averaged_are_refused(averaged, tmp_path):
    overrides, (first, _), _ = averaged
    target = next(one for one in overrides if one.startswith("target.path=")).partition("=")[2]
    for drafters, message in (
        ([first], "must be two directories"),
        ([first, f"{tmp_path}/none"], "none: no such directory"),
        ([first, target], "have different weights"),
    ):
        with pytest.raises(ValueError, match=message):
            stage("average", [*overrides, f"out={tmp_path}/new", f"average.drafters={drafters}"])


def test_weights_that_are_not_numbers_are_refused(averaged, tmp_path):
    overrides, (first, second), _ = averaged
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (Path(second)).iterdir():
        if file.is_file() and file.name != "manifest.json":
            (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights[min(weights)][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        stage("average", [*overrides, f"out={tmp_path}/new", f"average.drafters={[first, str(broken)]}"])
