"""A server that answers in the documented forms of llama-server, vLLM or SGLang, with blocks that a test gives."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

SECONDS = 0.5  # of an answer, as each engine reports it


class Text(NamedTuple):
    """What a server generates: its tokens, and the (drafted, accepted) tokens of each block after the first token."""

    tokens: list[int]
    blocks: list[tuple[int, int]]


class EngineStub:
    """Serve one engine's API on a port of this machine.

    Args:
        engine: llama-server, vllm or sglang.
        generate: returns the Text for a prompt and a limit.
        decode: returns the text of token ids.
        gamma: γ as the counters tell it; 0 for a server without a drafter.
        metrics: whether /metrics answers.
        lag: the number of answers of /metrics after a completion that do not have it yet.
        others: tokens that somebody else generates during each completion.
    """

    def __init__(self, engine, generate, decode, gamma=0, metrics=True, lag=0, others=0):
        self.engine, self.generate, self.decode, self.gamma = engine, generate, decode, gamma
        self.metrics, self.lag, self.others, self.prompts, self.late = metrics, lag, others, [], 0
        self.counted = self.shown = {"generated": 0, "seconds": 0.0, "drafts": 0, "drafted": 0, "accepted": 0}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, body):
        """Return the JSON of a completion."""
        prompt = body["input_ids" if self.engine == "sglang" else "prompt"]
        self.prompts.append(prompt)
        limit = {"llama-server": "n_predict", "vllm": "max_tokens"}.get(self.engine)
        text = self.generate(prompt, body[limit] if limit else body["sampling_params"]["max_new_tokens"])
        drafted, accepted = map(sum, zip(*text.blocks, strict=True)) if text.blocks else (0, 0)
        if self.engine != "llama-server":  # the others draft γ tokens also where fewer are left
            drafted = self.gamma * len(text.blocks)
        self.count(text, drafted, accepted)
        return {"/completion": llama, "/v1/completions": vllm, "/generate": sglang}[path](
            prompt, text, self.decode(text.tokens), drafted, accepted
        )

    def count(self, text, drafted, accepted):
        more = {"generated": len(text.tokens) + self.others, "seconds": SECONDS}
        more |= {"drafts": len(text.blocks) if self.gamma else 0, "drafted": drafted, "accepted": accepted}
        self.counted = {name: value + more[name] for name, value in self.counted.items()}
        self.late = self.lag

    def read_metrics(self):
        """Return the answer of /metrics, which may be late."""
        if self.late:
            self.late -= 1
        else:
            self.shown = self.counted
        if self.engine == "llama-server":
            return "".join(
                f'llamacpp:spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}} 1\n'
                for i in range(self.gamma)
            )
        return vllm_metrics(self.shown, self.gamma)


def llama(prompt, text, decoded, drafted, accepted):
    timings = {"cache_n": 0, "prompt_n": len(prompt), "prompt_ms": 9.0, "predicted_n": len(text.tokens)}
    timings |= {"predicted_ms": 1000 * SECONDS}
    if drafted:
        timings |= {"draft_n": drafted, "draft_n_accepted": accepted}
    found = {"content": decoded, "tokens": text.tokens, "stop": True, "stop_type": "limit", "truncated": False}
    return found | {"tokens_evaluated": len(prompt), "tokens_predicted": len(text.tokens), "timings": timings}


def vllm(prompt, text, decoded, drafted, accepted):
    choice = {"index": 0, "text": decoded, "token_ids": text.tokens, "finish_reason": "length", "stop_reason": None}
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(text.tokens)}
    return {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [choice], "usage": counts}


def sglang(prompt, text, decoded, drafted, accepted):
    meta = {"id": "1", "finish_reason": {"type": "length", "length": len(text.tokens)}, "prompt_tokens": len(prompt)}
    meta |= {"completion_tokens": len(text.tokens), "cached_tokens": 0, "e2e_latency": SECONDS}
    if drafted:
        meta |= {"spec_verify_ct": len(text.blocks), "spec_num_correct_drafts": accepted}
        meta |= {"spec_num_proposed_drafts": drafted, "spec_accept_length": len(text.tokens) / len(text.blocks)}
    return {"text": decoded, "output_ids": text.tokens, "meta_info": meta}


def vllm_metrics(counts, gamma):
    """Return /metrics of a vLLM with two engines, of which the second is idle."""
    lines = ["# HELP vllm:generation_tokens_total Number of generation tokens processed."]
    for engine, share in (("0", 1), ("1", 0)):
        labels = f'engine="{engine}",model_name="m"'
        values = {"generation_tokens_total": counts["generated"], "request_decode_time_seconds_sum": counts["seconds"]}
        if gamma:
            values |= {
                "spec_decode_num_drafts_total": counts["drafts"],
                "spec_decode_num_draft_tokens_total": counts["drafted"],
                "spec_decode_num_accepted_tokens_total": counts["accepted"],
            }
        lines += [f"vllm:{name}{{{labels}}} {float(value * share)}" for name, value in values.items()]
        lines.append(f"vllm:generation_tokens_created{{{labels}}} 1.7e+09")
        lines += [
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{i}"}} 1.0' for i in range(gamma)
        ]
    return "\n".join(lines) + "\n"


def handler_of(stub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, text):
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path != "/metrics" or not stub.metrics:
                return self.reply(501, json.dumps({"error": {"message": "Start it with `--metrics`"}}))
            return self.reply(200, stub.read_metrics())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(200, json.dumps(stub.answer(self.path, body)))

    return Handler
