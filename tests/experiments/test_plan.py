"""The plan of a pipeline, and dry runs of its stages: before anything runs, and with nothing at hand but configs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from drafter.data.target_cache import SparseFormat
from experiments import pipeline, plan
from experiments.planning.estimates import cached_bytes
from experiments.planning.roofline import Shape
from tests.conftest import save_target, small_model, write_jsonl
from tests.experiments.test_pipeline import snapshot, stage
from tests.training.test_ddp import run


def planned(capsys, *overrides):
    plan.main(list(overrides))
    return capsys.readouterr().out


def rows(page):
    """The first table of a page: stage -> column -> cell."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    header, body = lines[0], [line for line in lines[2:] if len(line) == len(lines[0])]
    return {line[0]: dict(zip(header, line, strict=True)) for line in body}


@pytest.mark.parametrize("scale", ["gpu", "llama2", "llama2_13b", "llama3", "qwen3"])
def test_every_scale_is_planned_without_a_hub(capsys, scale):
    page = planned(capsys, f"scale={scale}")
    found = rows(page)
    assert list(found) == ["pretrain", "respond", "cache", "finetune", "evaluate", "all"]
    assert found["pretrain"]["tokens"] == ("98.3M" if scale == "gpu" else "600B")
    assert float(found["all"]["device-hours"].replace(",", "")) > (0 if scale == "gpu" else 100)
    assert re.search(r"c = [012]\.\d\d%", page)


def test_another_target_is_planned_with_its_own_shape(capsys):
    page = planned(capsys, "scale=llama2", "target.path=assets/tiny-target", "drafter=tiny")
    assert "Target 3.44M parameters" in page


def test_the_papers_setting_has_the_papers_ratio_and_speed_up(capsys):
    page = planned(capsys, "scale=llama2")
    assert "c = 1.74%" in page
    assert "2.19 at γ = 3" in page  # 2.3 / (0.0174 · 3 + 1)


def test_more_finetunings_take_more_and_the_shared_stages_once(capsys):
    one, nine = (
        rows(planned(capsys, "scale=llama2", "losses=[kld,tvd,tvdpp]", f"seeds={seeds}"))
        for seeds in ("[1]", "[1,2,3]")
    )
    assert (one["finetune"]["runs"], nine["finetune"]["runs"]) == ("3", "9")
    hours = [float(table["finetune"]["device-hours"]) for table in (one, nine)]
    assert hours[1] == pytest.approx(3 * hours[0], rel=0.01)
    assert one["pretrain"] == nine["pretrain"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["hardware=rtx4090", "plan.gpus=1"],
            r"pretrain takes .* activations, .* RTX 4090 has 24 GB: lower pretrain\.batch",
        ),
        (
            ["hardware=rtx4090", "plan.gpus=8", "scale=llama2_13b"],
            r"respond takes .* key-value cache, .* 24 GB: target\.parallel=tensor",
        ),
        (["plan.disk=1e12"], r"the runs take .* of it cache, and plan\.disk is 1 TB: cache=sparse"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would_help(capsys, overrides, message):
    with pytest.raises(ValueError, match=message):
        planned(capsys, "scale=llama2", *overrides)


@pytest.mark.parametrize(
    "help_",
    [
        ["hardware=rtx4090", "plan.gpus=8", "scale=llama2_13b", "target.parallel=tensor"],
        ["plan.disk=1e12", "cache=sparse"],
        ["hardware=rtx4090", "plan.gpus=1", "pretrain.batch_size=32", "trainer.accumulate_grad_batches=8",
         "pretrain.gradient_checkpointing=true", "finetune.batch_size=40", "finetune.gradient_checkpointing=true",
         "respond.batch_tokens=8192"],
    ],
)  # fmt: skip
def test_what_the_refusal_names_does_help(capsys, help_):
    assert "device-hours" in planned(capsys, "scale=llama2", *help_)


def test_a_price_and_a_sparse_cache_show(capsys):
    exact, sparse = (
        rows(planned(capsys, "scale=llama2", "plan.price=2.5", *cache)) for cache in ([], ["cache=sparse"])
    )
    assert float(exact["all"]["price"].replace(",", "")) > 100
    assert exact["cache"]["disk"] == "1.3 TB"
    assert sparse["cache"]["disk"].endswith(" GB")


@pytest.mark.parametrize("override", ["pretrian.batch_size=3", "inputs.cahce=null"])
def test_an_unknown_setting_is_refused(capsys, override):
    with pytest.raises(ValueError, match="setting of no stage"):
        planned(capsys, override)


def test_a_live_target_is_held_beside_the_drafter_and_split_if_asked(capsys):
    def held(*how):
        page = planned(capsys, "scale=llama2", *how)
        lines = [line for line in page.splitlines() if line.startswith("|")]
        header = next(line for line in lines if "weights" in line).split(" | ")
        row = next(line for line in reversed(lines) if line.startswith("| finetune")).split(" | ")
        number, unit = dict(zip(header, row, strict=True))["target"].strip("| ").split()
        return float(number) * {"MB": 1e6, "GB": 1e9}[unit]

    cached, whole, split = held(), held("inputs.cache=null"), held("inputs.cache=null", "target.parallel=fsdp")
    assert cached == pytest.approx(32_000 * 4096 * 2, rel=0.01)
    assert whole > 6.7e9 * 2
    assert whole / 4 < split < whole / 2  # an eighth, the embeddings whole, layers in use, activations


STAGES = ("prepare", "pretrain", "respond", "cache", "finetune", "evaluate")


def test_a_dry_run_of_everything_shows_models_rows_and_batches_and_writes_nothing(world, capsys, tmp_path):
    overrides, root = world
    before = snapshot(root)
    pipeline.main([*overrides, "losses=[kld]", "dry_run=true"])
    told = capsys.readouterr().out
    assert snapshot(root) == before
    assert all(f"dry run of {name} -> {root}" in told for name in STAGES)
    assert "GPT2LMHeadModel" in told
    assert "24 rows, ends at [0], without a chat template" in told
    assert "text.jsonl: rows of [" in told
    assert "task prompts" in told
    assert f"cache: {root}/cache exists" in told
    assert re.search(r"batches of \d+ samples over 1 ranks", told)
    elsewhere = tmp_path / "none"
    pipeline.main([*overrides, "losses=[kld]", "dry_run=true", f"root={elsewhere}"])
    assert "cache does not exist yet: an earlier stage makes it" in capsys.readouterr().out
    assert not list(elsewhere.rglob("*.json*"))


@pytest.mark.parametrize("name", ["gamma", "trim"])
def test_the_stages_beside_the_pipeline_dry_run_too(world, capsys, name):
    overrides, root = world
    before = snapshot(root)
    stage(name, [*overrides, f"{name}.drafter={root}/drafter", "dry_run=true"])
    assert f"dry run of {name} -> {root}" in capsys.readouterr().out
    assert snapshot(root) == before


def test_the_flag_is_the_setting(world, tmp_path):
    overrides, _ = world
    run(sys.executable, "-m", "experiments.pretrain", *overrides, f"root={tmp_path}/root", "--dry-run")
    assert not list((tmp_path / "root").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("target.path=./nowhere", OSError, "cannot load './nowhere'"),
        ("data.pretraining.path=nowhere.jsonl", FileNotFoundError, "no data file at 'nowhere.jsonl'"),
        ("data.pretraining.template='{body}'", KeyError, "needs the field 'body'"),
        ("++data.instructions.questions.where.lang=xx", ValueError, "has no row that its settings choose"),
    ],
)
def test_what_would_fail_after_hours_fails_in_the_dry_run(world, override, error, message):
    overrides, _ = world
    with pytest.raises(error, match=message):
        pipeline.main([*overrides, "losses=[kld]", "dry_run=true", override])


ROWS = {  # the fields of the hub's data sets, as their cards and files have them; the texts are made up
    "pretraining": {"text": "The water boils at 100 degrees. " * 40, "id": "a", "url": "https://x", "score": 3.1},
    "oig": {"user": "The water boils. How?", "chip2": "It is heated until its vapour pressure is that of the air."},
    "oasst": {"message_id": "m", "parent_id": None, "text": "Why is the sky blue?", "role": "prompter", "lang": "en"},
    "dolly": {"instruction": "Who wrote it?", "context": "A book by Ada.", "response": "Ada", "category": "closed_qa"},
    "xsum": {"document": "A long story about a town. " * 9, "summary": "A town.", "id": "1"},
    "cnn": {"article": "The news of the day. " * 9, "highlights": "News.", "id": "2"},
    "wmt": {"translation": {"de": "Das Haus ist alt.", "en": "The house is old."}},
}


@pytest.fixture(scope="module")
def mirror(world, tmp_path_factory):
    """The paper's data sets as local files, and a small model with a tokenizer: the overrides."""
    overrides, folder = world[0], tmp_path_factory.mktemp("mirror")
    save_target(folder / "target", positions=4096)
    for name, row in ROWS.items():
        rows = [json.loads(json.dumps(row).replace("The ", f"The {number}. ")) for number in range(40)]
        if name == "oasst":
            rows = [row | {"text": f"Why {number}?"} for number in range(40)]
            rows += [row | {"role": "assistant"}, row | {"lang": "de"}, row | {"parent_id": "m"}]
        write_jsonl(folder / f"{name}.jsonl", rows)
    tasks = {"dolly": "dolly", "xsum": "xsum", "cnn_dailymail": "cnn", "wmt18_de_en": "wmt"}
    return [
        "trainer.accelerator=cpu",
        *[override for override in overrides if override.startswith("logger")],
        f"target.path={folder}/target",
        f"data.pretraining.path={folder}/pretraining.jsonl",
        f"data.instructions.oig.path={folder}/oig.jsonl",
        f"data.instructions.oasst.path={folder}/oasst.jsonl",
        *[f"task.{task}.path={folder}/{name}.jsonl" for task, name in tasks.items()],
    ]


def test_the_papers_data_are_read_from_mirrors_with_the_hubs_fields(mirror, tmp_path, capsys):
    command = ["scale=llama2", *mirror, "scale.pretraining_tokens=1000", "scale.heldout_tokens=1000"]
    command += ["data.heldout_percent=25", f"root={tmp_path}/run"]
    pipeline.main([*command, "losses=[tvdpp]", "dry_run=true"])
    told = capsys.readouterr().out
    assert "the first begins 'Summarize the following article in one sentence." in told
    assert "the first begins 'Translate the following German text to English." in told
    assert "the first begins 'Who wrote it?" in told
    run(sys.executable, "-m", "experiments.prepare", *command)
    found = [json.loads(line) for line in (tmp_path / "run" / "data" / "instructions.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in found} == {"oig", "oasst"}
    assert sum(row["kind"] == "oasst" for row in found) == 40  # first turns of English conversations alone
    assert {row["split"] for row in found} == {"train", "validation"}
    tasks = [json.loads(line) for line in (tmp_path / "run" / "data" / "tasks.jsonl").read_text().splitlines()]
    assert len(tasks) == 160


def commands():
    """Every command of docs/SCALE.md: a launcher, a module's name, and overrides."""
    page = (Path(__file__).parents[2] / "docs" / "SCALE.md").read_text()
    lines = [line for block in page.split("```")[1::2] for line in block.strip().splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match("make|python|torchrun", line)]


def test_the_page_has_commands_of_every_kind():
    assert {words[0] for words in commands()} == {"make", "python", "torchrun"}
    assert len(commands()) > 15


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_page_composes_and_dry_runs(words, mirror, tmp_path, capsys, monkeypatch):
    if words[0] == "make":
        words = ["python", "-m", {"plan": "experiments.plan", "demo": "experiments.pipeline"}[words[1]], *words[2:]]
        words = [word.lower() if word.startswith("SCALE") else word for word in words]
    place = next(place for place, word in enumerate(words) if word.startswith("experiments."))
    name, given = words[place].partition(".")[2], [one for one in words[place + 1 :] if one not in ("-m", "--dry-run")]
    given = [one.split(",")[0] if one.startswith(("loss=", "seed=")) else one for one in given]
    if words[0] == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "page")
    if name == "plan":
        plan.main(given)
        assert "device-hours" in capsys.readouterr().out
        return
    tiny = not any(one.startswith("scale=") for one in given)
    dry = [*given, *([] if tiny else mirror), f"root={tmp_path}", "dry_run=true"]
    if name == "pipeline":
        pipeline.main(dry)
    else:
        stage(name, dry)
    assert f"dry run of {'prepare' if name == 'pipeline' else name}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_estimated_size_of_a_sparse_cache_is_the_size_of_what_it_stores(dtype):
    how = OmegaConf.create({"cache": {"format": {"kind": "sparse", "top_k": 5, "num_samples": 3, "dtype": dtype}}})
    logits_NV, tokens_N = torch.randn(7, 64), torch.zeros(7, dtype=torch.long)
    stored = SparseFormat(5, 3, dtype).columns(None, lambda rows: logits_NV[rows], tokens_N)
    # Rows store ids of a vocabulary below 2^16 in two bytes; the estimate adds 16 bytes for the row itself.
    size = stored["ids"].size * 2 + stored["log_q"].nbytes + stored["log_rest"].nbytes
    assert stored.keys() == {"ids", "log_q", "log_rest"}
    assert cached_bytes(how, Shape.of(small_model())) == size / 7 + 16
