"""A drafter as serving engines load it, once it has passed the gate, with a model card. Config: conf/export.yaml.

The exported directory has the target's tokenizer, chat template and end-of-text ids: the gate has made sure that the
vocabulary is the same, and engines compare the rest. Weights are those of the untrimmed head: no engine that drafts
with a model of its own knows a head of fewer tokens, so a trimmed drafter's list of tokens lies beside them.
"""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import GenerationConfig, PreTrainedModel

from drafter.artifacts.manifest import Stage, is_record, sha256
from drafter.models.compatibility import Difference, check_pair, partner, with_rows
from drafter.models.ends import end_of_turn_ids
from drafter.models.fingerprints import model_fingerprint
from drafter.models.initialization import special_ids
from drafter.models.loading import load_model, load_tokenizer, vocabulary_width
from drafter.models.trimming import read_kept, write_kept
from experiments.exporting import to_gguf
from experiments.exporting.card import Facts, gather, serving, write_card
from experiments.running.commands import command
from experiments.running.inputs import claim, plain, target_source
from experiments.running.recording import record

# What each format calls a number's type.
DTYPES = {
    "hf": {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"},
    "gguf": {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "q8_0"},
    "openvino": {"float32": "fp32", "float16": "fp16", "int8": "int8"},
}


@command("export")
def main(cfg: DictConfig) -> None:
    """Check, save, convert, describe; print how to serve it."""
    facts = gather(cfg.export.drafter)
    cfg = resolved(cfg, facts.config)
    check(cfg)
    target = target_source(cfg)
    differences = check_pair(target, cfg.export.drafter, cfg.pad_vocabulary)
    inputs = {
        "drafter": model_fingerprint(partner(cfg.export.drafter, target)),
        "target": model_fingerprint(target),
    }
    settings = {key: value for key, value in plain(cfg.export).items() if key != "drafter"}
    stage = claim(cfg, "export", settings, inputs)
    if not stage.complete:
        export(cfg, stage, facts, differences)
        if facts.config and facts.config["logger"]["wandb"]:
            card = stage.directory / "README.md"
            record(OmegaConf.create(facts.config), "model-card", f"card-{stage.directory.name}", card)
    print(f"{stage.directory}: {cfg.export.format}, {cfg.export.dtype}\n")
    for difference in differences:
        print(f"  {difference}")
    for engine, lines in serving(cfg.export.format, cfg.target.path, str(stage.directory), facts.gamma).items():
        print(f"\n{engine}\n{lines}")


def resolved(cfg: DictConfig, known: dict[str, Any]) -> DictConfig:
    """The config with what the drafter's own config knows, if it has one: its target."""
    cfg = cfg.copy()
    if cfg.target.path is None and known:
        cfg.target.path, cfg.target.revision = known["target"]["path"], known["target"]["revision"]
    if cfg.target.path is None:
        raise ValueError(f"{cfg.export.drafter} does not say which target it was trained for: give target.path=…")
    rounded = "" if cfg.export.dtype == "float32" else f"-{cfg.export.dtype}"
    cfg.out = cfg.out or f"exports/{Path(cfg.export.drafter).name}-{cfg.export.format}{rounded}"
    return cfg


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be made, and tools that are not there, before anything is loaded.

    Raises:
        ValueError: names the value and what would do.
    """
    kind, dtype, converter = cfg.export.format, cfg.export.dtype, cfg.gguf.converter
    if kind not in DTYPES:
        raise ValueError(f"export.format is '{kind}', must be one of {sorted(DTYPES)}")
    if dtype not in DTYPES[kind]:
        raise ValueError(f"export.dtype is '{dtype}'; the format {kind} has {sorted(DTYPES[kind])}")
    if kind == "gguf" and not (converter and Path(converter).is_file()):
        raise ValueError(
            f"gguf.converter is '{converter}': give the path of convert_hf_to_gguf.py in a checkout of llama.cpp, "
            f"and with gguf.python a Python that has what it asks for"
        )
    tool = cfg.gguf.python if kind == "gguf" else cfg.openvino.command
    if kind != "hf" and not shutil.which(tool):
        raise ValueError(f"'{tool}' is no command here: docs/SERVING.md says how to install what {kind} needs")


def export(cfg: DictConfig, stage: Stage, facts: Facts, differences: list[Difference]) -> None:
    """Write the directory, its card and its manifest."""
    out = stage.directory
    kind, dtype = cfg.export.format, DTYPES[cfg.export.format][cfg.export.dtype]
    source = out if kind == "hf" else out / "hf.tmp"
    shutil.rmtree(out / "hf.tmp", ignore_errors=True)  # of a run that was cut off
    save_hf(cfg, source, facts.gamma)
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
    stage.finish(files, {"num_speculative_tokens": facts.gamma})


def is_content(path: Path) -> bool:
    """Whether a file is the export's, and not a stage's record."""
    return path.is_file() and not is_record(path.name) and path.suffix != ".tmp"


@torch.no_grad()
def save_hf(cfg: DictConfig, folder: Path, gamma: int) -> None:
    """A Hugging Face directory whose tokenizer, template and end-of-text ids are the target's."""
    target = target_source(cfg)
    tokenizer = load_tokenizer(target)
    model: PreTrainedModel = with_rows(load_model(partner(cfg.export.drafter, target)), vocabulary_width(target))
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
    tokenizer.save_pretrained(folder)


def run(command: list[str]) -> None:
    """A program of another package.

    Raises:
        RuntimeError: it failed; with the last lines that it printed.
    """
    found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if found.returncode:
        told = "\n".join((found.stdout + found.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"{shlex.join(command)} failed:\n{told}")


if __name__ == "__main__":
    main()
