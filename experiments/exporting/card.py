"""Write the model card of an exported drafter: how to serve it, its measured results, and how it was made."""

import json
import shlex
from pathlib import Path

import jinja2
from omegaconf import DictConfig, OmegaConf

from drafter.artifacts.manifest import write_text
from drafter.artifacts.storage import local_directory
from drafter.metrics import Estimate
from drafter.models.compatibility import Difference, template
from drafter.models.loading import load_tokenizer
from drafter.models.trimming import read_kept
from experiments.exporting.facts import Facts, GammaReport
from experiments.exporting.recipe import describe_architecture
from experiments.reporting.results import ResultRow
from experiments.reporting.tabular import Table, with_interval
from experiments.running.inputs import target_source


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
    chat = f"python -m experiments.chat target.path={shlex.quote(target)} chat.drafter={shlex.quote(drafter)}"
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
    return {"vLLM": vllm, "SGLang": sglang, "transformers": "\n".join(lines), "this project": chat}


def write_card(folder: Path, cfg: DictConfig, facts: Facts, differences: list[Difference]) -> None:
    """Write the README.md of an exported directory, with the header that the hub reads."""
    tokenizer = load_tokenizer(target_source(cfg))
    base = cfg.export.base_model or (None if local_directory(cfg.target.path) else cfg.target.path)
    gamma, report = facts.gamma(cfg.export.format), facts.report(cfg.export.format)
    header = {
        "library_name": {"hf": "transformers", "gguf": "gguf", "openvino": "openvino"}[cfg.export.format],
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model"],
        **({"base_model": base} if base else {}),
        **({"license": cfg.export.license} if cfg.export.license else {}),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("model_card.md.jinja").render(
        header=OmegaConf.to_yaml(OmegaConf.create(header)).strip(),
        cfg=cfg,
        facts=facts,
        name=base or cfg.target.path,
        training=training_table(cfg.export.drafter, facts.training).markdown(),
        results=results_table(facts.rows).markdown() if facts.rows else "",
        gammas=gamma_table(facts.reports).markdown() if facts.reports else "",
        gamma=gamma,
        report=report,
        best=facts.best,
        interval=with_interval,
        commands=serving(cfg.export.format, cfg.target.path, str(folder), gamma),
        vocabulary=len(tokenizer.get_vocab()),
        template=template(tokenizer),
        differences=differences,
        kept=read_kept(cfg.export.drafter),
    )
    write_text(folder / "README.md", text)


def results_table(rows: list[ResultRow]) -> Table:
    """Return the table of results: one line per task and gamma."""
    columns = ["task", "γ", "prompts", "τ", "MBSU", "acceptance rate", "token rate"]
    lines = []
    for row in rows:
        figures: list[Estimate] = [row.block_efficiency, row.speedup, row.acceptance_rate, row.token_rate_ratio]
        lines.append([row.task.replace("_", " "), str(row.gamma), str(row.prompts), *map(with_interval, figures)])
    return Table("results", "Results", columns, lines)


def gamma_table(reports: list[GammaReport]) -> Table:
    """Return the table of the best gamma: one line per engine and task."""
    lines = []
    for report in reports:
        for row in report.best():
            rate = with_interval(row.measured) if row.measured else f"{row.predicted:.2f} (predicted)"
            cells = [str(row.gamma), f"{row.block_efficiency:.2f}", f"{row.cost:.2f}", rate]
            lines.append([report.engine, row.task.replace("_", " "), *cells])
    columns = ["engine", "task", "best γ", "τ", "cost of a block in target calls", "token rate over the target alone"]
    return Table("gamma", "Best gamma", columns, lines)


def training_table(drafter: str, training: dict[str, str]) -> Table:
    """Return the table of how the drafter was made: its architecture, training, data and code."""
    described = describe_architecture(drafter) | training
    return Table("training", "How it was made", ["", ""], [list(row) for row in described.items()])
