"""Decodes prompts with vLLM or SGLang and a drafter; run by a Python that has them, on a GPU.

stdin: {"engine", "target", "drafter", "num_speculative_tokens", "prompts", "max_new_tokens"}
stdout, last line: [{"tokens"}, ...]
"""

import json
import sys


def by_vllm(asked):
    from vllm import LLM, SamplingParams

    drafting = {"model": asked["drafter"], "num_speculative_tokens": asked["num_speculative_tokens"]}
    engine = LLM(model=asked["target"], dtype="float32", speculative_config={**drafting, "method": "draft_model"})
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"])
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


def by_sglang(asked):
    import sglang

    gamma = asked["num_speculative_tokens"]
    engine = sglang.Engine(
        model_path=asked["target"],
        dtype="float32",
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=asked["drafter"],
        speculative_num_steps=gamma,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=gamma + 1,
    )
    how = {"temperature": 0, "max_new_tokens": asked["max_new_tokens"]}
    return [output["output_ids"] for output in engine.generate(input_ids=asked["prompts"], sampling_params=how)]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    tokens = {"vllm": by_vllm, "sglang": by_sglang}[asked["engine"]](asked)
    print(json.dumps([{"tokens": row} for row in tokens]))
