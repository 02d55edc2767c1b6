"""Write SmolLM2-135M-Instruct as a model directory, from the hub or from the Python package that contains it.

Config: conf/smollm2_target.yaml. The package has the model as a 4-bit GGUF, which transformers dequantises. Its weights
then differ from the hub's by the quantisation, so that each is a target of its own; `origin.json` in the directory says
which one it is. In both cases the weights are written in bfloat16.
"""

import importlib.util
import json
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from drafter.models.loading import load_model, load_tokenizer, save_tokenizer
from drafter.models.source import ModelSource
from experiments.running.commands import command
from experiments.running.inputs import ORIGIN

log = logging.getLogger(__name__)
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, str]


@command("smollm2_target")
def main(cfg: DictConfig) -> None:
    """Write the directory, unless it is there.

    Raises:
        ValueError: `origin` is unknown, or the directory is there with the other origin.
        OSError: neither the hub nor the package can be read.
    """
    if cfg.origin not in (None, "hub", "package"):
        raise ValueError(f"origin is {cfg.origin!r}, must be hub, package or null")
    out = Path(cfg.out)
    if (out / ORIGIN).exists():
        found = json.loads((out / ORIGIN).read_text(encoding="utf-8"))["origin"]
        if cfg.origin not in (None, found):
            raise ValueError(
                f"{out} has the model of origin={found}: give origin={cfg.origin} another directory, out=…"
            )
        log.info("%s is up to date (origin=%s)", out, found)
        return
    origin, (model, tokenizer, described) = load(cfg)
    write(model, tokenizer, out, {"origin": origin, "from": described})


def load(cfg: DictConfig) -> tuple[str, Loaded]:
    """Return the origin, and the model with its tokenizer and a description of where it is from."""
    if cfg.origin == "package":
        return "package", from_package(cfg)
    try:
        return "hub", from_hub(cfg)
    except OSError as problem:
        if cfg.origin == "hub":
            raise
        log.info("the hub cannot be reached (%.60s…): looking for the package %s", problem, cfg.package.module)
        return "package", from_package(cfg)


def from_hub(cfg: DictConfig) -> Loaded:
    """Load the model from the hub."""
    source = ModelSource(cfg.hub.path, cfg.hub.revision, dtype="bfloat16")
    tokenizer, commit = load_tokenizer(source), source.where()["revision"]
    return load_model(source), tokenizer, f"{cfg.hub.path}, revision {commit}"


def from_package(cfg: DictConfig) -> Loaded:
    """Load the model from the GGUF in the package, dequantised.

    Raises:
        OSError: the package, or the package that reads GGUF, is not installed.
    """
    specs = {name: importlib.util.find_spec(name) for name in (cfg.package.module, "gguf")}
    if needed := [name for name, spec in specs.items() if spec is None]:
        raise OSError(
            f"SmolLM2-135M-Instruct is not there: the hub was not reached or not asked, and the Python package "
            f"{' and '.join(needed)} is not installed. `{cfg.package.install}` installs what is needed"
        )
    folder = str(Path(specs[cfg.package.module].origin).parent)  # type: ignore[union-attr, arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=cfg.package.file)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=cfg.package.file, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are no longer quantised
    config.dtype, config._name_or_path = torch.bfloat16, ""
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer, f"{cfg.package.file} of the Python package {cfg.package.module}, dequantised"


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, origin: dict[str, str]) -> None:
    """Write the model in bfloat16 with its tokenizer, and last where it is from.

    The files do not depend on the version of transformers, so that it is the same target on every machine.
    """
    config = model.config
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((out / name).read_text(encoding="utf-8"))
        fields.pop("transformers_version", None)
        (out / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (out / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    log.info("wrote %s: %s", out, origin["from"])


if __name__ == "__main__":
    main()
