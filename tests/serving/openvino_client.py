"""Decodes prompts with OpenVINO GenAI, alone or with a drafter; run by the serving environment's Python.

stdin: {"target", "drafter" or null, "num_speculative_tokens", "prompts": ids, "max_new_tokens", "stop_ids"}
stdout, last line: [{"tokens", "target_calls", "accepted"}, ...]
"""

import json
import sys

import numpy as np
import openvino
import openvino_genai as genai

asked = json.load(sys.stdin)
exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
with_drafter = {"draft_model": genai.draft_model(asked["drafter"], "CPU", **exact)} if asked["drafter"] else {}
pipe = genai.LLMPipeline(asked["target"], "CPU", **with_drafter, **exact)
config = genai.GenerationConfig()
config.do_sample = False
config.max_new_tokens = asked["max_new_tokens"]
config.stop_token_ids = set(asked["stop_ids"])
if asked["drafter"]:
    config.num_assistant_tokens = asked["num_speculative_tokens"]
found = []
for ids in asked["prompts"]:
    tensors = (openvino.Tensor(np.array([row], dtype=np.int64)) for row in (ids, [1] * len(ids)))
    result = pipe.generate(genai.TokenizedInputs(*tensors), config)
    metrics = result.extended_perf_metrics if asked["drafter"] else None
    calls = len(metrics.main_model_metrics.raw_metrics.m_durations) if metrics else len(result.tokens[0])
    accepted = metrics.get_num_accepted_tokens() if metrics else 0
    found.append({"tokens": list(result.tokens[0]), "target_calls": calls, "accepted": accepted})
print(json.dumps(found))
