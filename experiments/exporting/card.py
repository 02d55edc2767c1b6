"""Write the model card of an exported drafter: how to serve it, its measured results, and how it was made."""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from omegaconf import DictConfig, OmegaConf

from drafter.artifacts.manifest import MANIFEST, read_manifest, write_text
from drafter.artifacts.storage import local_directory
from drafter.metrics import Estimate
from drafter.models.compatibility import Difference, template
from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import load_config, load_tokenizer
from drafter.models.trimming import read_kept
from experiments.reporting.identity import identity_of, read_record
from experiments.reporting.results import POOLED, ResultRow, read_evaluations, summarise
from experiments.reporting.tabular import Table, with_interval
from experiments.running.inputs import target_source

DEFAULT_GAMMA = 3  # the paper's gamma, used if nothing was measured


class Facts(NamedTuple):
    """What is known of a drafter.

    Attributes:
        manifest: of the stage that made it; empty for a drafter from elsewhere.
        config: of that stage.
        rows: the results of its evaluation.
        size_ratio: c, the drafter's parameters divided by the target's; None if it was not evaluated.
    """

    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: list[ResultRow]
    size_ratio: float | None

    @property
    def best(self) -> ResultRow | None:
        """The result with the highest MBSU over the tasks in the domain; None if nothing was measured."""
        fixed = [row for row in self.rows if isinstance(row.gamma, int)]
        pooled = [row for row in fixed if row.task == POOLED] or fixed
        return max(pooled, key=lambda row: row.speedup.value, default=None)

    @property
    def gamma(self) -> int:
        """The number of tokens to draft per block."""
        return int(self.best.gamma) if self.best else DEFAULT_GAMMA


def manifest_of(folder: str) -> dict[str, Any]:
    """Return a directory's manifest; {} if no stage of this project made it."""
    path = Path(folder) / MANIFEST
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def gather(drafter: str) -> Facts:
    """Return what is known of a drafter. If no stage of this project made it, that is only its manifest, if any.

    Raises:
        ArtifactError: an earlier version of this project made it.
    """
    manifest = manifest_of(drafter)
    config = manifest.get("config", {})
    if not config:
        return Facts(manifest, config, [], None)
    identity_of(drafter)
    found = []
    for ours in sorted(Path(config["root"]).glob(f"evaluate*/*/{MANIFEST}")):
        if read_manifest(ours.parent, "evaluate")["inputs"]["drafter"] == model_fingerprint(drafter):
            found += [one for one in read_evaluations(ours.parent.parent) if one.directory == ours.parent]
    found = sorted(found, key=lambda one: not one.is_timed)
    rows = summarise(found[:1], base=found[0].series) if found else []
    return Facts(manifest, config, rows, found[0].size_ratio if found else None)


def serving(kind: str, target: str, drafter: str, gamma: int) -> dict[str, str]:
    """Return the command, or the lines of Python, with which each engine serves the pair.

    Args:
        kind: the format of the export: hf, gguf or openvino.
        target: the target's path or hub name; paths are quoted as the shell or Python needs it.
        drafter: the exported directory.
        gamma: the number of tokens to draft per block.

    Returns:
        engine -> text to paste.
    """
    if kind == "gguf":
        file = shlex.quote(f"{drafter}/{next(iter(Path(drafter).glob('*.gguf')), Path('drafter.gguf')).name}")
        options = f"--model-draft {file} --spec-type draft-simple --spec-draft-n-max {gamma}"
        return {"llama.cpp (the target converted likewise)": f"llama-server --model target.gguf {options}"}
    target_text, drafter_text = (json.dumps(path, ensure_ascii=False) for path in (target, drafter))
    if kind == "openvino":
        model = f'genai.draft_model({drafter_text}, "CPU")'
        lines = [
            "import openvino_genai as genai",
            f'pipe = genai.LLMPipeline("target-openvino", "CPU", draft_model={model})',
            f'print(pipe.generate("…", max_new_tokens=256, do_sample=False, num_assistant_tokens={gamma}))',
        ]
        return {"OpenVINO GenAI, greedy (the target exported by optimum-cli)": "\n".join(lines)}
    speculative = {"model": drafter, "num_speculative_tokens": gamma, "method": "draft_model"}
    sglang = (
        f"python -m sglang.launch_server --model-path {shlex.quote(target)} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {shlex.quote(drafter)} --speculative-num-steps {gamma} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {gamma + 1}"
    )
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({target_text})",
        f"target = AutoModelForCausalLM.from_pretrained({target_text})",
        f"drafter = AutoModelForCausalLM.from_pretrained({drafter_text})",
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)[0]))",
    ]
    vllm = shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(speculative, ensure_ascii=False)])
    return {"vLLM": vllm, "SGLang": sglang, "transformers": "\n".join(lines)}


def write_card(folder: Path, cfg: DictConfig, facts: Facts, differences: list[Difference]) -> None:
    """Write the README.md of an exported directory, with the header that the hub reads."""
    tokenizer = load_tokenizer(target_source(cfg))
    is_path = local_directory(cfg.target.path) is not None
    header = {
        "library_name": {"hf": "transformers", "gguf": "gguf", "openvino": "openvino"}[cfg.export.format],
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model"],
        **({} if is_path else {"base_model": cfg.target.path}),
        **({"license": cfg.export.license} if cfg.export.license else {}),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("model_card.md.jinja").render(
        header=OmegaConf.to_yaml(OmegaConf.create(header)).strip(),
        cfg=cfg,
        facts=facts,
        training=training_table(cfg.export.drafter, facts.manifest).markdown() if facts.manifest else "",
        results=results_table(facts.rows).markdown() if facts.rows else "",
        best=facts.best,
        is_timed=is_timed(facts.rows),
        interval=with_interval,
        commands=serving(cfg.export.format, cfg.target.path, str(folder), facts.gamma),
        vocabulary=len(tokenizer.get_vocab()),
        template=template(tokenizer),
        differences=differences,
        kept=read_kept(cfg.export.drafter),
    )
    write_text(folder / "README.md", text)


def is_timed(rows: list[ResultRow]) -> bool:
    """Return whether the results, which are of one evaluation, have token rates."""
    return any(row.token_rate_ratio for row in rows)


def results_table(rows: list[ResultRow]) -> Table:
    """Return the table of results: one line per task and gamma."""
    columns = ["task", "γ", "prompts", "τ", "MBSU", "acceptance rate"]
    columns += ["token rate"] if is_timed(rows) else []
    lines = []
    for row in rows:
        figures: list[Estimate] = [row.block_efficiency, row.speedup, row.acceptance_rate]
        figures += [row.token_rate_ratio] if row.token_rate_ratio else []
        lines.append([row.task.replace("_", " "), str(row.gamma), str(row.prompts), *map(with_interval, figures)])
    return Table("results", "Results", columns, lines)


def training_table(drafter: str, manifest: dict[str, Any]) -> Table:
    """Return the table of how the drafter was made: its architecture, training, data and code."""
    described = describe_architecture(drafter) | describe_training(manifest)
    return Table("training", "How it was made", ["", ""], [list(row) for row in described.items()])


def describe_architecture(drafter: str) -> dict[str, str]:
    """Return a line that describes the drafter's architecture."""
    config = load_config(drafter)
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads"
    tied = "tied" if config.tie_word_embeddings else "untied"
    return {"architecture": f"{config.model_type}: {shape}, {config.vocab_size:,} rows of embedding, {tied}"}


def describe_training(manifest: dict[str, Any]) -> dict[str, str]:
    """Return lines on how the drafter was made, from its manifest and those of its inputs that are on this machine.

    Raises:
        ArtifactError: an earlier version of this project made the drafter.
    """
    config = manifest.get("config", {})
    if not config:
        return {}
    if manifest["stage"] == "trim":
        head = f"{manifest['counts']['kept']} of {manifest['counts']['vocabulary']} tokens kept"
        return {"head": head} | describe_training(manifest_of(config["trim"]["drafter"]))
    rows = {"seed": str(config["seed"]), "command": f"`{manifest['command']}`"}
    if manifest["stage"] == "finetune":
        settings, drafter = manifest["settings"], read_record(manifest, config["out"])
        values = {key: value for key, value in settings["loss_settings"].items() if key != "name"}
        rows["distillation loss"] = ", ".join([str(drafter.loss), *(f"{key} {one}" for key, one in values.items())])
        rows["distillation"] = (
            f"{settings['max_steps']} steps of {settings['batch_size']} samples, "
            f"{settings['text_share']:.0%} of them text; {manifest['seconds']:.0f} s"
        )
        rows |= describe_responses(config)
        rows |= describe_pretraining(config["inputs"].get("drafter", ""))
    else:
        rows |= describe_pretraining(str(config["out"]))
    rows["data"] = ", ".join(data_names(config["data"]))
    environment = manifest["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return rows | {"code": f"commit {environment['commit']}; {versions}"}


def describe_responses(config: dict[str, Any]) -> dict[str, str]:
    """Return a line on the responses that the drafter was trained on."""
    folder = config["inputs"].get("cache") or config["inputs"].get("responses") or ""
    if not (manifest := manifest_of(folder)):
        return {}
    counts = manifest["counts"]
    if manifest["stage"] == "cache":
        size = f"{counts['rows']} responses of {counts['tokens']} tokens"
    else:
        size = f"{counts['written']} responses"
    how = config["distillation"]
    return {"responses": f"{size}, written by: {how['by']}, at temperatures {how['temperatures']}"}


def describe_pretraining(folder: str) -> dict[str, str]:
    """Return a line on the pretraining that the drafter started from."""
    manifest = manifest_of(folder)
    if manifest.get("stage") != "pretrain":
        return {}
    settings = manifest["settings"]
    tokens = settings["max_steps"] * settings["batch_size"] * settings["sequence_length"]
    return {"pretraining": f"{settings['max_steps']} steps, {tokens:,} tokens, {manifest['seconds']:.0f} s"}


def data_names(data: dict[str, Any]) -> list[str]:
    """Return the names of the data sets, with the revision if one is given."""
    if data["kind"] == "docstrings":
        return ["docstrings and code of " + ", ".join(data["packages"])]
    found = [data["pretraining"], *data["instructions"].values()]
    return [str(one["path"]) + (f" ({one['revision']})" if one.get("revision") else "") for one in found]
