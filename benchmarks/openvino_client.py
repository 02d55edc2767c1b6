"""Decode prompts with OpenVINO GenAI, alone or with a drafter; run by the serving environment's Python.

stdin, the first line: {"target", "drafter" or null, "exact": in float32, "threads" or null, "stop_ids"}
stdin, each other line: {"prompt": ids, "max_new_tokens", "num_speculative_tokens"}
stdout, a line each: {"tokens", "target_calls", "drafted", "accepted", "seconds", "decoding_seconds"}
"""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai as genai


def load(settings):
    """Return the pipeline with both models."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if settings["exact"] else {}
    options |= {"INFERENCE_NUM_THREADS": settings["threads"]} if settings["threads"] else {}
    drafter = {"draft_model": genai.draft_model(settings["drafter"], "CPU", **options)} if settings["drafter"] else {}
    return genai.LLMPipeline(settings["target"], "CPU", **drafter, **options)


def decode(pipe, settings, asked):
    """Return what one prompt gives."""
    config = genai.GenerationConfig()
    config.do_sample = False
    config.max_new_tokens = asked["max_new_tokens"]
    config.stop_token_ids = set(settings["stop_ids"])
    if settings["drafter"]:
        config.num_assistant_tokens = asked["num_speculative_tokens"]
    ids = asked["prompt"]
    tensors = (openvino.Tensor(np.array([row], dtype=np.int64)) for row in (ids, [1] * len(ids)))
    began = time.perf_counter()
    result = pipe.generate(genai.TokenizedInputs(*tensors), config)
    seconds = time.perf_counter() - began
    tokens = list(result.tokens[0])
    metrics = result.extended_perf_metrics if settings["drafter"] else None
    counts = {"target_calls": len(tokens), "drafted": 0, "accepted": 0}
    if metrics:
        calls = len(metrics.main_model_metrics.raw_metrics.m_durations)
        counts = {"target_calls": calls, "drafted": metrics.get_num_draft_tokens()}
        counts["accepted"] = metrics.get_num_accepted_tokens()
    first = result.perf_metrics.get_ttft().mean / 1000
    return {"tokens": tokens, **counts, "seconds": seconds, "decoding_seconds": seconds - first}


if __name__ == "__main__":
    settings = json.loads(sys.stdin.readline())
    pipe = load(settings)
    for line in sys.stdin:
        print(json.dumps(decode(pipe, settings, json.loads(line))), flush=True)
