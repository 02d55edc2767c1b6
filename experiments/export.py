"""Export a drafter in a format that serving engines load, with a model card. Config: conf/export.yaml.

The command refuses a drafter that is not compatible with its target. The exported directory has the target's
tokenizer, chat template and end-of-text ids, because engines compare them with the target's. The weights have the
untrimmed head, because no engine supports a drafter whose head has fewer tokens; a trimmed drafter's list of tokens is
exported beside them.
"""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import GenerationConfig, PreTrainedModel

from drafter.artifacts.manifest import MANIFEST, Stage, is_record, sha256
from drafter.models.compatibility import Difference, check_pair, drafter_source, resize_vocabulary
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.fingerprints import model_fingerprint
from drafter.models.initialization import special_ids
from drafter.models.loading import load_model, load_tokenizer, save_tokenizer, vocabulary_width
from drafter.models.trimming import read_kept, write_kept
from experiments.exporting import to_gguf
from experiments.exporting.card import describe_rule, write_card
from experiments.exporting.facts import Facts, gather
from experiments.exporting.recipe import absolute_paths
from experiments.exporting.serving import serving
from experiments.reporting.identity import STEPS
from experiments.running.commands import command
from experiments.running.inputs import claim, plain, target_source
from experiments.running.recording import record

# Format -> dtype -> the name that the format's converter has for it.
DTYPES = {
    "hf": {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"},
    "gguf": {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "q8_0"},
    "openvino": {"float32": "fp32", "float16": "fp16", "int8": "int8"},
}
IDENTITY = {"format", "dtype", "license"}  # the other settings of an export are part of its identity if they are given


@command("export")
def main(cfg: DictConfig) -> None:
    """Export the drafter with its model card, and print the commands that serve it."""
    facts = gather(cfg.export.drafter, cfg.export.engines)
    cfg = with_target(cfg, facts.config)
    check_format(cfg)
    check_head(cfg.export.drafter, facts.manifest.get("stage"))
    target = target_source(cfg)
    differences = check_pair(target, cfg.export.drafter, cfg.pad_vocabulary)
    inputs = {
        "drafter": model_fingerprint(drafter_source(cfg.export.drafter, target)),
        "target": model_fingerprint(target),
    }
    given = plain(cfg.export)
    settings = {key: value for key, value in given.items() if key in IDENTITY or (value and key != "drafter")}
    stage = claim(cfg, "export", settings, inputs)
    if not stage.complete:
        export(cfg, stage, facts, differences)
        if facts.config.get("logger", {}).get("wandb"):
            card = stage.directory / "README.md"
            series = facts.manifest["settings"].get("series")
            record(OmegaConf.create(facts.config), "model-card", f"card-{stage.directory.name}", card, series=series)
    print(f"{stage.directory}: {cfg.export.format}, {cfg.export.dtype}\n")
    for difference in differences:
        print(f"  {difference}")
    gamma = facts.gamma(cfg.export.format)
    commands = serving(cfg.export.format, cfg.target.path, str(stage.directory), gamma, facts.rule)
    for engine, lines in commands.items():
        print(f"\n{engine}\n{describe_rule(engine, facts, gamma)}\n{lines}")
    if paths := absolute_paths(*(stage.directory / name for name in ("README.md", MANIFEST))):
        print(f"\nBefore you publish it: it names {', '.join(paths)}. Give paths relative to the working directory")


def with_target(cfg: DictConfig, trained: dict[str, Any]) -> DictConfig:
    """Return a copy of the config in which the target, the directory and what an export says already are filled in.

    Args:
        cfg: the config; what it names is kept.
        trained: the config of the stage that made the drafter, which names the target that it was trained for, and that
            of an export its licence; {} for a drafter from elsewhere.

    Raises:
        ValueError: neither config names a target.
    """
    cfg = cfg.copy()
    if cfg.target.path is None and trained:
        cfg.target.path, cfg.target.revision = trained["target"]["path"], trained["target"]["revision"]
    if cfg.target.path is None:
        raise ValueError(f"{cfg.export.drafter} does not say which target it was trained for: give target.path=…")
    for name in ("license", "base_model", "notes"):
        cfg.export[name] = cfg.export[name] or trained.get("export", {}).get(name)
    rounded = "" if cfg.export.dtype == "float32" else f"-{cfg.export.dtype}"
    cfg.out = cfg.out or f"exports/{Path(cfg.export.drafter).name}-{cfg.export.format}{rounded}"
    return cfg


def check_format(cfg: DictConfig) -> None:
    """Check the format, the dtype and the converter before anything is loaded.

    Raises:
        ValueError: the format or dtype is unknown, or the converter is not installed; the error names what is allowed.
    """
    kind, dtype, converter = cfg.export.format, cfg.export.dtype, cfg.gguf.converter
    if kind not in DTYPES:
        raise ValueError(f"export.format is '{kind}', must be one of {sorted(DTYPES)}")
    if dtype not in DTYPES[kind]:
        raise ValueError(f"export.dtype is '{dtype}'; the format {kind} has {sorted(DTYPES[kind])}")
    if kind == "gguf" and not (converter and Path(converter).is_file()):
        raise ValueError(
            f"gguf.converter is '{converter}': give the path of convert_hf_to_gguf.py in a checkout of llama.cpp, "
            f"and with gguf.python a Python in which its requirements are installed"
        )
    tool = cfg.gguf.python if kind == "gguf" else cfg.openvino.command
    if kind != "hf" and not shutil.which(tool):
        raise ValueError(f"'{tool}' is not an installed command: docs/SERVING.md says how to install what {kind} needs")


def check_head(drafter: str, stage: str | None) -> None:
    """Check that every row of the output embedding was trained, because no engine supports a drafter with fewer.

    Args:
        drafter: its directory.
        stage: the stage that made it, if it is known.

    Raises:
        ValueError: the drafter was trained to propose some tokens alone.
    """
    was_trained = stage in ("pretrain", "finetune") or Path(drafter).parent.name == STEPS
    if was_trained and (kept := read_kept(drafter)):
        raise ValueError(
            f"export.drafter is {drafter}, which was trained to propose {len(kept)} tokens alone. Engines draft with "
            f"the whole output embedding, whose other rows were not trained: export one trained with "
            f"kept_tokens=null or with sampled_tokens"
        )


def export(cfg: DictConfig, stage: Stage, facts: Facts, differences: list[Difference]) -> None:
    """Write the weights in the chosen format, the model card and the manifest."""
    out = stage.directory
    kind, dtype = cfg.export.format, DTYPES[cfg.export.format][cfg.export.dtype]
    source = out if kind == "hf" else out / "hf.tmp" / Path(cfg.export.drafter).name  # llama.cpp takes its name from it
    shutil.rmtree(out / "hf.tmp", ignore_errors=True)  # left by an interrupted run
    gamma = facts.gamma(kind)
    save_hf(cfg, source, gamma)
    if kind == "gguf":
        file = out / f"{Path(cfg.export.drafter).name}.gguf"
        script = [cfg.gguf.python, to_gguf.__file__, cfg.gguf.converter]
        run([*script, str(source), "--outfile", str(file), "--outtype", dtype])
    if kind == "openvino":
        task = ["--task", "text-generation-with-past", "--weight-format", dtype]
        run([cfg.openvino.command, "export", "openvino", "--model", str(source), *task, str(out)])
    if kept := read_kept(cfg.export.drafter):
        write_kept(out, kept)
    shutil.rmtree(out / "hf.tmp", ignore_errors=True)
    write_card(out, cfg, facts, differences)
    files = {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*")) if is_content(path)}
    stage.made_by["facts"] = facts.record()
    stage.finish(files, {"num_speculative_tokens": gamma})


def is_content(path: Path) -> bool:
    """Return whether a file is part of the export, and not a record of the stage."""
    return path.is_file() and not is_record(path.name) and path.suffix != ".tmp"


@torch.no_grad()
def save_hf(cfg: DictConfig, folder: Path, gamma: int) -> None:
    """Save a Hugging Face directory with the target's tokenizer, chat template and end-of-text ids."""
    target = target_source(cfg)
    tokenizer = load_tokenizer(target)
    model: PreTrainedModel = resize_vocabulary(
        load_model(drafter_source(cfg.export.drafter, target)), vocabulary_width(target)
    )
    if cfg.export.format == "hf":  # the other formats' own converters round
        model.to(getattr(torch, cfg.export.dtype))
    ids: dict[str, Any] = special_ids(tokenizer, vocabulary_width(target))
    for name, token in ids.items():
        setattr(model.config, name, token)
    ids["eos_token_id"] = end_of_turn_ids(target, tokenizer)
    # transformers reads from the assistant's generation config how it drafts: always gamma tokens, however sure it is.
    model.generation_config = GenerationConfig(
        **ids,
        num_assistant_tokens=gamma,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def run(command: list[str]) -> None:
    """Run a program of another package.

    Raises:
        RuntimeError: the program failed; the error has the last lines that it printed.
    """
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if finished.returncode:
        output = "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"{shlex.join(command)} failed:\n{output}")


if __name__ == "__main__":
    main()
