"""The plan of a pipeline and dry runs of its stages, which need only configs and compute nothing."""

import contextlib
import functools
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from drafter.artifacts.manifest import write_json
from drafter.data.target_cache import ExactFormat, SparseFormat, normalise
from drafter.losses.chunked import Head
from experiments import pipeline, plan, pretrain
from experiments.planning.estimates import cached_bytes, estimates, finetuning_operations
from experiments.planning.roofline import Shape, operations
from experiments.planning.world import World
from experiments.running.composing import cells, configured, gather_stage_overrides
from experiments.running.jobs import Job, all_jobs
from tests.conftest import save_target, small_model, write_jsonl
from tests.experiments.test_pipeline import snapshot, stage


@functools.cache
def plan_page(*overrides):
    """Return what `python -m experiments.plan` prints. Cached, because several tests read the same page."""
    with contextlib.redirect_stdout(io.StringIO()) as page:
        plan.main(list(overrides))
    return page.getvalue()


def rows(page):
    """Return the first table of a page: stage -> column -> cell."""
    first = page.partition("\n## ")[0]
    header, _, *body = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(header, line, strict=True)) for line in body}


@pytest.mark.end_to_end
@pytest.mark.parametrize("scale", ["gpu", "llama2", "llama2_13b", "llama3", "qwen3"])
def test_every_scale_is_planned_without_a_hub(scale):
    page = plan_page(f"scale={scale}")
    found = rows(page)
    assert list(found) == ["pretrain", "respond", "cache", "finetune", "evaluate", "all"]
    assert found["pretrain"]["tokens"] == ("98.3M" if scale == "gpu" else "600B")
    assert float(found["all"]["device-hours"].replace(",", "")) > (0 if scale == "gpu" else 100)
    assert re.search(r"c = [012]\.\d\d%", page)


def test_another_target_is_planned_with_its_own_shape():
    page = plan_page("scale=llama2", "target.path=assets/tiny-target", "drafter=tiny")
    assert "Target 3.44M parameters" in page


def test_a_finished_stage_takes_no_time(tmp_path):
    write_json(tmp_path / "responses" / "manifest.json", {"stage": "respond"})
    write_json(tmp_path / "cache" / "manifest.json", {"stage": "another one"})
    page = plan_page("scale=llama2", f"root={tmp_path}")
    assert "Finished already, and without time in the table: respond.\n" in page
    without = {stage for stage, row in rows(page).items() if row["time"] == "0 s"}
    assert without == {"respond"}
    assert "Finished already" not in plan_page("scale=llama2", f"root={tmp_path / 'other'}")


def test_the_papers_scale_has_the_papers_size_ratio_and_speedup():
    page = plan_page("scale=llama2")
    assert "c = 1.74%" in page
    assert "2.19 at γ = 3" in page  # 2.3 / (0.0174 · 3 + 1)


@pytest.mark.end_to_end
def test_finetuning_grows_with_the_number_of_runs_and_shared_stages_do_not():
    one_seed, two_seeds = (rows(plan_page("scale=llama2", "losses=[kld,tvd]", f"seeds={s}")) for s in ("[1]", "[1,2]"))
    assert (one_seed["finetune"]["runs"], two_seeds["finetune"]["runs"]) == ("2", "4")
    hours = [float(table["finetune"]["device-hours"]) for table in (one_seed, two_seeds)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.01)
    assert one_seed["pretrain"] == two_seeds["pretrain"]


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
def test_a_plan_that_cannot_fit_is_refused_and_the_error_names_a_remedy(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_page("scale=llama2", *overrides)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "remedy",
    [
        ["hardware=rtx4090", "plan.gpus=8", "scale=llama2_13b", "target.parallel=tensor"],
        ["plan.disk=1e12", "cache=sparse"],
        ["hardware=rtx4090", "plan.gpus=1", "pretrain.batch_size=32", "trainer.accumulate_grad_batches=8",
         "pretrain.gradient_checkpointing=true", "finetune.batch_size=40", "finetune.gradient_checkpointing=true",
         "respond.batch_tokens=8192"],
    ],
)  # fmt: skip
def test_the_remedies_that_the_errors_name_make_the_plan_fit(remedy):
    assert "device-hours" in plan_page("scale=llama2", *remedy)


@pytest.mark.end_to_end
def test_the_plan_shows_the_price_and_the_smaller_disk_of_a_sparse_cache():
    exact, sparse = (rows(plan_page("scale=llama2", "plan.price=2.5", *cache)) for cache in ([], ["cache=sparse"]))
    assert float(exact["all"]["price"].replace(",", "")) > 100
    assert exact["cache"]["disk"] == "1.3 TB"
    assert sparse["cache"]["disk"].endswith(" GB")


def test_states_of_the_responses_save_the_pass_of_the_cache():
    shape = Shape(3_440_000, 3_000_000, 4, 256, 256, 8192, 2048)
    with initialize_config_module("conf", version_base="1.3"):
        hardware = compose("plan", ["hardware=cpu"]).hardware
        plain = World(hardware, 1, shape, shape, prompt=90, response=25, block_efficiency=1.4, finetunings=1)
        kept = plain._replace(states="bfloat16")
        (with_pass,), (without,), (sparse,) = (
            estimates(Job("cache", configured("cache", ["scale=smoke", *change]), None), world)
            for world, change in ((plain, []), (kept, []), (kept, ["cache=sparse"]))
        )
        (alone,), (keeping,) = (
            estimates(Job("respond", configured("respond", ["scale=smoke", *change]), None), plain)
            for change in ([], ["respond.states=bfloat16"])
        )
    assert without.disk == with_pass.disk
    assert 0 < without.operations < with_pass.operations / 2
    assert 0 < without.seconds < with_pass.seconds / 2
    assert without.memory["weights"] < with_pass.memory["weights"]
    assert with_pass.operations > 0 < sparse.operations
    assert keeping.disk > 2 * alone.disk


def test_what_the_target_writes_itself_is_planned():
    shape = Shape(3_440_000, 3_000_000, 4, 256, 256, 8192, 2048)
    with initialize_config_module("conf", version_base="1.3"):
        hardware = compose("plan", ["hardware=cpu"]).hardware
        world = World(hardware, 1, shape, shape, prompt=90, response=25, block_efficiency=1.4, finetunings=1)
        asked = "+data.pretraining={kind: docstrings, packages: [fsspec]}"
        with_text, alone, none = (
            list(estimates(Job("prepare", configured("prepare", ["scale=smoke", *change]), None), world))
            for change in (["data=self"], ["data=self", "~data.pretraining", asked], [])
        )
    # 1.1 * 64 / 0.8 instructions of 90 tokens, four fifths of which can be used, and as much text as in the config.
    assert alone[0].tokens == pytest.approx(88 * 90 / 0.8)
    assert with_text[0].tokens == pytest.approx((88 * 90 + 1.1 * 100_000 / 0.8) / 0.8)
    assert with_text[0].seconds > 5 * alone[0].seconds > 0
    assert none == []


def test_the_targets_passes_of_pretraining_and_a_trimmed_head_are_planned():
    target = Shape(3_440_000, 3_000_000, 4, 256, 256, 4096, 2048)
    drafter = Shape(158_000, 158_000, 2, 32, 32, 4096, 128)
    with initialize_config_module("conf", version_base="1.3"):
        hardware, kept = compose("plan", ["hardware=cpu"]).hardware, ["pretrain.kept_tokens=1024"]
        world = World(hardware, 1, target, drafter, prompt=90, response=25, block_efficiency=1.4, finetunings=1)
        alone, distilled, trimmed, sampled = (
            next(estimates(Job("pretrain", configured("pretrain", ["scale=smoke", *change]), None), world))
            for change in ([], ["pretrain.distillation.weight=0.5"], kept, [*kept, "pretrain.sampled_tokens=512"])
        )
    tokens, heldout = 20 * 16 * 256, 2 * 10_000  # of the training, and of the validations before and after it
    passes = operations(target, tokens + heldout, 128)
    assert distilled.operations - alone.operations == pytest.approx(passes)
    device = world.device(low=False)
    assert distilled.seconds - alone.seconds > passes / (device.flops * device.efficiency)
    assert distilled.memory["target"] > 4 * target.parameters
    assert alone.operations - trimmed.operations == 3 * 2 * tokens * 3072 * 32
    assert alone.operations - sampled.operations == 3 * 2 * tokens * (3072 - 512) * 32
    assert trimmed.seconds < sampled.seconds < alone.seconds
    assert "target" not in alone.memory


@pytest.mark.parametrize("override", ["pretrian.batch_size=3", "inputs.cahce=null"])
def test_an_unknown_setting_is_refused(override):
    with pytest.raises(ValueError, match="setting of no stage"):
        plan_page(override)


@pytest.mark.end_to_end
def test_kept_tokens_spare_the_logits_of_the_others_in_both_models():
    with initialize_config_module("conf", version_base="1.3"):
        cfgs = [configured("finetune", ["loss=kld", *change]) for change in ([], ["finetune.kept_tokens=1024"])]
    target, drafter = (Shape(1e6, 1e6, 2, hidden, hidden, 4096, 64, 0, 1.0) for hidden in (256, 64))
    whole, kept = (finetuning_operations(cfg, drafter, target) for cfg in cfgs)
    scored = cfgs[0].finetune.batch_size * (1 - cfgs[0].finetune.text_share) * cfgs[0].scale.expected.response_tokens
    text = cfgs[0].finetune.batch_size * cfgs[0].finetune.text_share * cfgs[0].finetune.sequence_length
    spared = 2 * 3072 * (256 * scored + 3 * 64 * (scored + text))
    assert whole - kept == pytest.approx(spared)


def test_finetuning_without_a_cache_holds_the_target_and_fsdp_splits_it():
    def target_bytes(*overrides):
        page = plan_page("scale=llama2", *overrides)
        lines = [line for line in page.splitlines() if line.startswith("|")]
        header = next(line for line in lines if "weights" in line).split(" | ")
        row = next(line for line in reversed(lines) if line.startswith("| finetune")).split(" | ")
        number, unit = dict(zip(header, row, strict=True))["target"].strip("| ").split()
        return float(number) * {"MB": 1e6, "GB": 1e9}[unit]

    full, split = target_bytes("inputs.cache=null"), target_bytes("inputs.cache=null", "target.parallel=fsdp")
    assert target_bytes() == pytest.approx(32_000 * 4096 * 2, rel=0.01)  # the output embedding
    assert full > 6.7e9 * 2
    # An eighth of the layers, and in full: the embeddings, the layers in use and the activations.
    assert full / 4 < split < full / 2


@pytest.mark.parametrize(
    ("experiment", "count"), [("losses", 24), ("rules", 27), ("data", 27), ("transfer", 12), ("transfer_paper", 9)]
)
def test_each_experiment_is_a_sweep_with_as_many_cells_as_it_should_have(experiment, count):
    with initialize_config_module("conf", version_base="1.3"):
        found = cells("finetune", experiment)
    assert len({tuple(cell) for cell in found}) == len(found) == count
    assert json.dumps(found).count("seed=") == count


def test_the_pipeline_runs_each_stage_once_and_each_finetuning_of_its_losses_and_experiments():
    overrides = ["losses=[kld]", "seeds=[1]", "experiments=[transfer]", "along.losses=[kld]", "respond.top_p=0.9"]
    with initialize_config_module("conf", version_base="1.3"):
        jobs = all_jobs(compose("pipeline", gather_stage_overrides("pipeline", overrides)))
    assert [job.stage for job in jobs] == [
        "prepare", "pretrain", "respond", "cache", *["finetune"] * 5, *["evaluate"] * 3, "tables"
    ]  # fmt: skip
    finetunings = [job.cfg.name for job in jobs if job.stage == "finetune"]
    assert finetunings[:2] == ["kld-seed1", "tvdpp-responses_33-seed1"]
    variants, steps, finished = (job.cfg for job in jobs if job.stage == "evaluate")
    assert list(variants.drafters) == [f"runs/tiny/variants/{name}" for name in finetunings[1:]]
    assert list(steps.drafters) == ["runs/tiny/finetune/kld-seed1/steps/*"]
    assert variants.out == "runs/tiny/evaluate_variants"
    assert finished.out == "runs/tiny/evaluate"
    assert [job.cfg.respond.top_p for job in jobs if "respond" in job.cfg] == [0.9]


@pytest.mark.parametrize(("data", "has_answers"), [("smollm2", False), ("docstrings", True)])
def test_self_written_instructions_have_no_answers_to_train_on(caplog, data, has_answers):
    overrides = ["losses=[]", "seeds=[1]", "experiments=[data]", f"data={data}"]
    with initialize_config_module("conf", version_base="1.3"):
        jobs = all_jobs(compose("pipeline", gather_stage_overrides("pipeline", overrides)))
    variants = {job.choice("variant") for job in jobs if job.stage == "finetune"}
    assert ("reference" in variants) == has_answers
    assert len(variants) == 8 + has_answers
    assert any(job.cfg.out.endswith("responses-reference") for job in jobs) == has_answers
    assert ("variant=reference is left out" in caplog.text) != has_answers


STAGES = ("prepare", "pretrain", "respond", "cache", "finetune", "evaluate")


def test_a_dry_run_of_the_pipeline_shows_models_rows_and_batches_and_writes_nothing(world, capsys, tmp_path):
    overrides, root = world
    before = snapshot(root)
    pipeline.main([*overrides, "losses=[kld]", "dry_run=true"])
    printed = capsys.readouterr().out
    assert snapshot(root) == before
    assert all(f"dry run of {name} -> {root}" in printed for name in STAGES)
    assert "GPT2LMHeadModel" in printed
    assert "24 rows, ends at [0], without a chat template" in printed
    assert "text.jsonl: rows of [" in printed
    assert "task prompts" in printed
    assert f"cache: {root}/cache exists" in printed
    assert re.search(r"batches of \d+ samples over 1 ranks", printed)
    elsewhere = tmp_path / "none"
    pipeline.main([*overrides, "losses=[kld]", "dry_run=true", f"root={elsewhere}"])
    assert "cache does not exist yet: an earlier stage makes it" in capsys.readouterr().out
    assert not list(elsewhere.rglob("*.json*"))


@pytest.mark.parametrize("name", ["gamma", "trim"])
def test_a_dry_run_of_a_command_outside_the_pipeline_writes_nothing(world, capsys, name):
    overrides, root = world
    before = snapshot(root)
    stage(name, [*overrides, f"{name}.drafter={root}/drafter", "dry_run=true"])
    assert f"dry run of {name} -> {root}" in capsys.readouterr().out
    assert snapshot(root) == before


def test_the_flag_dry_run_has_the_effect_of_the_setting(world, tmp_path, monkeypatch, capsys):
    overrides, _ = world
    monkeypatch.setattr("sys.argv", ["pretrain", *overrides, f"root={tmp_path}/root", "--dry-run"])
    pretrain.main()
    assert f"dry run of pretrain -> {tmp_path}/root" in capsys.readouterr().out
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
def test_a_wrong_path_field_or_filter_fails_in_the_dry_run(world, override, error, message):
    overrides, _ = world
    with pytest.raises(error, match=message):
        pipeline.main([*overrides, "losses=[kld]", "dry_run=true", override])


# Rows with the fields of the hub's data sets, as their cards document them. The texts are made up.
ROWS = {
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
    """Return the overrides that read the paper's data sets from local files, with a small model as the target."""
    overrides, folder = world[0], tmp_path_factory.mktemp("mirror")
    save_target(folder / "target", positions=8192)
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


def test_the_papers_data_sets_are_read_from_local_files_with_the_hubs_fields(mirror, tmp_path, capsys):
    command = ["scale=llama2", *mirror, "scale.pretraining_tokens=1000", "scale.heldout_tokens=1000"]
    command += ["data.heldout_percent=25", f"root={tmp_path}/run"]
    pipeline.main([*command, "losses=[tvdpp]", "dry_run=true"])
    printed = capsys.readouterr().out
    assert "the first begins 'Summarize the following article in one sentence." in printed
    assert "the first begins 'Translate the following German text to English." in printed
    assert "the first begins 'Who wrote it?" in printed
    stage("prepare", command)
    found = [json.loads(line) for line in (tmp_path / "run" / "data" / "instructions.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in found} == {"oig", "oasst"}
    assert sum(row["kind"] == "oasst" for row in found) == 40  # only first turns of English conversations
    assert {row["split"] for row in found} == {"train", "validation"}
    tasks = [json.loads(line) for line in (tmp_path / "run" / "data" / "tasks.jsonl").read_text().splitlines()]
    assert len(tasks) == 160


def commands():
    """Return every command of docs/SCALE.md as words: a launcher, a module's name, and overrides."""
    page = (Path(__file__).parents[2] / "docs" / "SCALE.md").read_text()
    lines = [line for block in page.split("```")[1::2] for line in block.strip().splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match("make|python|torchrun", line)]


def test_the_scale_page_has_commands_with_each_launcher():
    assert {words[0] for words in commands()} == {"make", "python", "torchrun"}
    assert len(commands()) > 15


@pytest.mark.end_to_end
@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_scale_page_runs_dry(words, mirror, tmp_path, capsys, monkeypatch):
    if words[0] == "make":
        words = ["python", "-m", {"plan": "experiments.plan", "demo": "experiments.pipeline"}[words[1]], *words[2:]]
        words = [word.lower() if word.startswith("SCALE") else word for word in words]
    index = next(i for i, word in enumerate(words) if word.startswith("experiments."))
    name, given = words[index].partition(".")[2], [one for one in words[index + 1 :] if one not in ("-m", "--dry-run")]
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_estimated_size_of_an_exact_cache_is_the_size_of_what_it_stores(dtype):
    how = OmegaConf.create({"cache": {"format": {"kind": "exact", "dtype": dtype}}})
    target = small_model()
    hidden_NH = torch.randn(7, Shape.of(target).hidden)
    stored = ExactFormat(dtype).columns(hidden_NH, None, None) | normalise(hidden_NH, Head.from_module(target.lm_head))
    assert stored.keys() == {field.name for field in ExactFormat(dtype).fields(64)}
    assert cached_bytes(how, Shape.of(target)) == sum(array.nbytes for array in stored.values()) / 7 + 16


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_estimated_size_of_a_sparse_cache_is_the_size_of_what_it_stores(dtype):
    how = OmegaConf.create({"cache": {"format": {"kind": "sparse", "top_k": 5, "num_samples": 3, "dtype": dtype}}})
    logits_NV, tokens_N = torch.randn(7, 64), torch.zeros(7, dtype=torch.long)
    stored = SparseFormat(5, 3, dtype).columns(None, lambda rows: logits_NV[rows], tokens_N)
    # Rows store ids of a vocabulary below 2^16 in two bytes; the estimate adds 16 bytes for the row itself.
    size = stored["ids"].size * 2 + stored["log_q"].nbytes + stored["log_rest"].nbytes
    assert stored.keys() == {"ids", "log_q", "log_rest"}
    assert cached_bytes(how, Shape.of(small_model())) == size / 7 + 16


@pytest.mark.end_to_end
def test_a_task_that_evaluates_all_turns_takes_twice_as_many_tokens():
    every, first = (
        rows(
            plan_page("scale=llama2", "target.path=assets/tiny-target", "task=mt_bench", f"task.mt_bench.turns={turns}")
        )
        for turns in ("all", "first")
    )
    assert (first["evaluate"]["tokens"], every["evaluate"]["tokens"]) == ("990k", "1.98M")
