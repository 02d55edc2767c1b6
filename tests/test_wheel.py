"""The built wheel, installed in an environment of its own, runs the whole pipeline from an empty directory."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end
ROOT = Path(__file__).parent.parent
# A few steps of each stage: what the pipeline computes is tested elsewhere.
SMALLEST = [
    "scale.pretraining_tokens=20_000", "scale.heldout_tokens=2_000", "scale.instructions=16", "scale.num_responses=16",
    "scale.prompts_per_task=1", "scale.pretrain_steps=2", "scale.validate_every=2", "scale.finetune_steps=2",
    "scale.finetune_keep_every=2", "scale.finetune_validate_every=2", "evaluate.num_speculative_tokens=[3]",
]  # fmt: skip


@pytest.fixture
def python(tmp_path):
    """Return the interpreter of a new environment with the wheel, and with the dependencies of this one.

    The dependencies are found through the path of this environment's packages. A path that is added this way does not
    add the checkout, which an editable install adds by a .pth file.
    """
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if name.startswith(("drafter/", "experiments/", "conf/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", packages, wheel], check=True)
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "env" / "bin" / "python"


def test_the_pipeline_runs_from_an_installed_wheel_in_an_empty_directory(python, tmp_path):
    (tmp_path / "empty").mkdir()
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path / "empty", env=surroundings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in ("drafter", "experiments"):
        assert str(tmp_path / "env") in run("-c", f"import {package}; print({package}.__file__)")
    target = f"target.path={ROOT / 'assets' / 'tiny-target'}"
    run("-m", "experiments.pipeline", "scale=smoke", "losses=[kld]", "seeds=[1]", "logger=csv", target, *SMALLEST)
    made = tmp_path / "empty" / "runs" / "smoke"
    assert "| kld |" in (made / "report" / "results.md").read_text()
    assert (made / "finetune" / "kld-seed1" / "model.safetensors").exists()
