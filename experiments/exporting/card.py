"""What an exported drafter says of itself, from its manifests: how to serve it, what it is worth, how it was made."""

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
from experiments.reporting.results import POOLED, Row, read_evaluations, summarise
from experiments.reporting.tabular import Table, with_interval
from experiments.running.inputs import target_source

DEFAULT_GAMMA = 3  # the paper's, where nothing was measured


class Facts(NamedTuple):
    """What is known of a drafter: the manifest and config of its making, and the rows of its evaluation."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: list[Row]
    size_ratio: float | None

    @property
    def best(self) -> Row | None:
        """The gamma with the highest MBSU over the tasks in the domain; none where nothing was measured."""
        fixed = [row for row in self.rows if isinstance(row.gamma, int)]
        pooled = [row for row in fixed if row.task == POOLED] or fixed
        return max(pooled, key=lambda row: row.speedup.value, default=None)

    @property
    def gamma(self) -> int:
        """How many tokens to draft."""
        return int(self.best.gamma) if self.best else DEFAULT_GAMMA


def manifest_of(folder: str) -> dict[str, Any]:
    """What made a directory; nothing, if it was no stage of this project."""
    path = Path(folder) / MANIFEST
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def gather(drafter: str) -> Facts:
    """What lies beside a drafter; little, if it is none of this project's."""
    manifest = manifest_of(drafter)
    config = manifest.get("config", {})
    if not config:
        return Facts(manifest, config, [], None)
    found = []
    for ours in sorted(Path(config["root"]).glob(f"evaluate*/*/{MANIFEST}")):
        if read_manifest(ours.parent, "evaluate")["inputs"]["drafter"] == model_fingerprint(drafter):
            found += [one for one in read_evaluations(ours.parent.parent) if one.directory == ours.parent]
    rows = summarise(found[:1], base=found[0].loss) if found else []
    return Facts(manifest, config, rows, found[0].size_ratio if found else None)


def serving(kind: str, target: str, drafter: str, gamma: int) -> dict[str, str]:
    """Engine -> the command, or the lines of Python, that serve the pair; each can be pasted, whatever the paths."""
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
    """README.md of an exported directory, with the hub's header."""
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
        made=architecture(cfg.export.drafter) | making(facts.manifest) if facts.manifest else {},
        worth=worth(facts.rows).markdown() if facts.rows else "",
        best=facts.best,
        interval=with_interval,
        commands=serving(cfg.export.format, cfg.target.path, str(folder), facts.gamma),
        vocabulary=len(tokenizer.get_vocab()),
        template=template(tokenizer),
        differences=differences,
        kept=read_kept(cfg.export.drafter),
    )
    write_text(folder / "README.md", text)


def worth(rows: list[Row]) -> Table:
    """Each task at each gamma."""
    columns = ["task", "γ", "prompts", "τ", "MBSU", "acceptance rate", "token rate"]
    lines = []
    for row in rows:
        figures: list[Estimate] = [row.block_efficiency, row.speedup, row.acceptance_rate, row.token_rate_ratio]
        lines.append([row.task.replace("_", " "), str(row.gamma), str(row.prompts), *map(with_interval, figures)])
    return Table("worth", "What it is worth", columns, lines)


def architecture(drafter: str) -> dict[str, str]:
    """The drafter's shape."""
    config = load_config(drafter)
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads"
    tied = "tied" if config.tie_word_embeddings else "untied"
    return {"architecture": f"{config.model_type}: {shape}, {config.vocab_size:,} rows of embedding, {tied}"}


def making(manifest: dict[str, Any]) -> dict[str, str]:
    """How the drafter came about, in the words of its manifests; a part that is not at hand is left out."""
    config = manifest.get("config", {})
    if not config:
        return {}
    if manifest["stage"] == "trim":
        head = f"{manifest['counts']['kept']} of {manifest['counts']['vocabulary']} tokens kept"
        return {"head": head} | making(manifest_of(config["trim"]["drafter"]))
    told = {"seed": str(config["seed"]), "command": f"`{manifest['command']}`"}
    if manifest["stage"] == "finetune":
        settings, loss = manifest["settings"], dict(manifest["settings"]["loss"])
        named = str(loss.pop("_target_", "")).rsplit(".", 1)[-1]
        loss.pop("_partial_", None)
        told["distillation loss"] = ", ".join([named, *(f"{key} {value}" for key, value in loss.items())])
        told["distillation"] = (
            f"{settings['max_steps']} steps of {settings['batch_size']} samples, "
            f"{settings['text_share']:.0%} of them text; {manifest['seconds']:.0f} s"
        )
        told |= written(config)
        told |= pretrained(config["inputs"].get("drafter", ""))
    else:
        told |= pretrained(str(config["out"]))
    told["data"] = ", ".join(sources(config["data"]))
    environment = manifest["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return told | {"code": f"commit {environment['commit']}; {versions}"}


def written(config: dict[str, Any]) -> dict[str, str]:
    """The responses that were trained on."""
    folder = config["inputs"].get("cache") or config["inputs"].get("responses") or ""
    if not (manifest := manifest_of(folder)):
        return {}
    counts = manifest["counts"]
    size = (
        f"{counts['rows']} responses of {counts['tokens']} tokens"
        if "rows" in counts
        else f"{counts['written']} responses"
    )
    how = config["distillation"]
    return {"responses": f"{size}, written by: {how['by']}, at temperatures {how['temperatures']}"}


def pretrained(folder: str) -> dict[str, str]:
    """The pretraining that a drafter began with."""
    manifest = manifest_of(folder)
    if manifest.get("stage") != "pretrain":
        return {}
    settings = manifest["settings"]
    tokens = settings["max_steps"] * settings["batch_size"] * settings["sequence_length"]
    return {"pretraining": f"{settings['max_steps']} steps, {tokens:,} tokens, {manifest['seconds']:.0f} s"}


def sources(data: dict[str, Any]) -> list[str]:
    """Names of the data sets, with the revision where one is given."""
    if "packages" in data:
        return ["docstrings and code of " + ", ".join(data["packages"])]
    asked = data["instructions"]
    found = [data["pretraining"], *(asked.values() if isinstance(asked, dict) else asked)]
    return [str(one["path"]) + (f" ({one['revision']})" if one.get("revision") else "") for one in found]
