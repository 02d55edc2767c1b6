"""The command, or the lines of Python, with which each engine serves a pair, and the acceptance rule that it follows.

docs/SERVING.md has the sources.
"""

import json
import shlex
from pathlib import Path
from typing import Any


def followed_rule(engine: str, rule: str = "ratio") -> str | None:
    """Return the acceptance rule that an engine follows above temperature 0 with the command of `serving`.

    >>> followed_rule("vLLM"), followed_rule("vLLM", "argmax"), followed_rule("SGLang")
    ('ratio', 'argmax', 'argmax')

    Args:
        engine: its name in `serving`.
        rule: the rule that the drafter was made for.

    Returns:
        The rule; None if the engine follows none that keeps the target's distribution.
    """
    if engine == "vLLM":
        return "ratio" if rule == "ratio" else "argmax"
    if engine.startswith("OpenVINO"):
        return None
    return "ratio" if engine in ("transformers", "this project") else "argmax"


def serving(
    kind: str, target: str, drafter: str, gamma: int, rule: str = "ratio", sets_gamma: bool = False
) -> dict[str, str]:
    """Return the command, or the lines of Python, with which each engine serves the pair.

    Args:
        kind: the format of the export: hf, gguf or openvino.
        target: the target's path or hub name; paths are quoted as the shell or Python needs it.
        drafter: the exported directory.
        gamma: the number of tokens to draft per block.
        rule: the acceptance rule that the drafter was made for, which is chosen where an engine has the choice.
        sets_gamma: whether transformers and this project are told gamma, too. They read it from an exported directory.

    Returns:
        engine -> text to paste.
    """
    if kind == "gguf":
        file = shlex.quote(f"{drafter}/{next(iter(Path(drafter).glob('*.gguf')), Path('drafter.gguf')).name}")
        options = f"--model-draft {file} --spec-type draft-simple --spec-draft-n-max {gamma} --spec-draft-p-min 0"
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
    speculative = vllm_speculation(drafter, gamma, rule)
    sglang = (
        f"python -m sglang.launch_server --model-path {shlex.quote(target)} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {shlex.quote(drafter)} --speculative-num-steps {gamma} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {gamma + 1}"
    )
    chat = f"python -m experiments.chat target.path={shlex.quote(target)} chat.drafter={shlex.quote(drafter)}"
    fields = (
        f'num_assistant_tokens={gamma}, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0'
    )
    own = [f"drafter.generation_config.update({fields})"] if sets_gamma else []
    if sets_gamma:
        chat += f" chat.num_speculative_tokens={gamma}"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({target_text})",
        f'target = AutoModelForCausalLM.from_pretrained({target_text}, dtype="float32")',
        f'drafter = AutoModelForCausalLM.from_pretrained({drafter_text}, dtype="float32")',
        *own,
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)[0]))",
    ]
    vllm = shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(speculative, ensure_ascii=False)])
    return {"vLLM": vllm, "SGLang": sglang, "transformers": "\n".join(lines), "this project": chat}


def serving_ngrams(target: str, smallest: int, largest: int, gamma: int) -> dict[str, str]:
    """Return how engines use their own prompt lookup, which needs no draft model, with n-grams of these lengths.

    Each accepts such drafts with the target's probability of them, which is the same by every acceptance rule.
    """
    speculative = vllm_lookup(smallest, largest, gamma)
    chat = f"python -m experiments.chat target.path={shlex.quote(target)} chat.drafter=ngram{smallest}-{largest}"
    arguments = f"prompt_lookup_num_tokens={gamma}, max_matching_ngram_size={largest}"
    return {
        "vLLM": shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(speculative)]),
        "transformers": f"target.generate(**inputs, {arguments})",
        "this project": f"{chat} chat.num_speculative_tokens={gamma}",
    }


def vllm_speculation(drafter: str, gamma: int, rule: str) -> dict[str, Any]:
    """Return what vLLM's `--speculative-config` has for a draft model (see `serving`)."""
    fields = {"model": drafter, "num_speculative_tokens": gamma, "method": "draft_model"}
    return {**fields, "draft_sample_method": "probabilistic"} if rule == "ratio" else fields


def vllm_lookup(smallest: int, largest: int, gamma: int) -> dict[str, Any]:
    """Return what vLLM's `--speculative-config` has for its own prompt lookup (see `serving_ngrams`)."""
    fields = {"prompt_lookup_max": largest, "prompt_lookup_min": smallest}
    return {"method": "ngram", "num_speculative_tokens": gamma, **fields}
