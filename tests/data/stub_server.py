"""A server of completions that misbehaves on demand: what vLLM, SGLang, llama-server and text-only servers answer."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny"


class Stub:
    """Serve completions on a port of this machine.

    Args:
        tokenizer: the served model's.
        stop: the token that ends each answer.
        flavour: "vllm" (ids come back), "sglang" (text comes back), "llama" (/completion) or "text" (refuses ids).
        faults: what goes wrong with the first completions, one after the other; a fault is a function of the handler
            and of the proper answer, or None for none.
        added: how many tokens the server adds to each prompt.
        port: the port; 0 is a free one.
        names: the models that it lists.
    """

    def __init__(self, tokenizer, stop, flavour="vllm", faults=(), added=0, port=0, names=(MODEL,)):
        self.tokenizer, self.stop, self.flavour, self.added, self.names = tokenizer, stop, flavour, added, names
        self.faults, self.bodies, self.headers, self.busy, self.most, self.connections = list(faults), [], [], 0, 0, 0
        self.dead = False
        self.delay, self.lock, self.answer_text = 0.0, threading.Lock(), answer_text
        self._server = Listener(("127.0.0.1", port), handler_of(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()

    def close(self):
        self.dead = True
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def answer(self, body):
        """Return the proper answer to a request, or a status and a message."""
        prompt = body["prompt"]
        if isinstance(prompt, list) and self.flavour == "text":
            return 400, {"error": {"message": "prompt must be a string"}}
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        limit = body.get("max_tokens", body.get("n_predict"))
        written = [
            *self.tokenizer(self.answer_text(ids, body["seed"]), add_special_tokens=False)["input_ids"],
            self.stop,
        ]
        ended, written = len(written) <= limit, written[:limit]
        plain = written[:-1] if ended else written
        text, read = self.tokenizer.decode(plain), len(ids) + self.added
        if self.flavour == "llama":
            kind = "eos" if ended else "limit"
            counts = {"tokens_evaluated": read, "tokens_predicted": len(written), "truncated": False}
            return 200, {"content": text, "tokens": written, "stop_type": kind, **counts}
        choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
        if self.flavour == "vllm":
            choice |= {"token_ids": written, "stop_reason": self.stop if ended else None}
        elif self.flavour == "sglang":
            choice |= {"matched_stop": self.stop if ended else None}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": read, "completion_tokens": len(written)}}


class Listener(ThreadingHTTPServer):
    """Threads that are told to end with their connections, and errors that are not printed."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass


def answer_text(ids, seed):
    return f" The answer is {sum(ids)}."


def handler_of(stub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            stub.connections += 1

        def log_message(self, *_):
            pass

        def reply(self, status, content, headers=(), length=None):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(length or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def hang_up(self):
            self.close_connection = True

        def do_GET(self):
            owner = {"llama": "llamacpp"}.get(stub.flavour, stub.flavour)
            self.reply(200, {"data": [{"id": name, "owned_by": owner} for name in stub.names]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = "/completion" if stub.flavour == "llama" else "/v1/completions"
            if self.path != path:
                return self.reply(404, {"error": {"message": f"no {self.path}"}})
            with stub.lock:
                stub.bodies.append(body)
                stub.headers.append(dict(self.headers))
                stub.busy += 1
                stub.most = max(stub.most, stub.busy)
                fault = stub.faults.pop(0) if stub.faults else None
            time.sleep(stub.delay)
            with stub.lock:
                stub.busy -= 1
            if stub.dead:  # connections that were open are not answered either
                return self.hang_up()
            status, answer = stub.answer(body)
            if fault is None:
                return self.reply(status, answer)
            return fault(self, answer)

    return Handler


Fault = Callable[[Any, dict], None]


def status(code, message="no", headers=()) -> Fault:
    return lambda handler, answer: handler.reply(code, {"error": {"message": message}}, headers)


def changed(change) -> Fault:
    """Return a fault that changes the proper answer in place."""

    def fault(handler, answer):
        change(answer)
        handler.reply(200, answer)

    return fault


def hang_up(handler, answer):
    handler.hang_up()


def cut_body(handler, answer):
    """Promise more bytes than are sent, as a server does that dies while it writes."""
    data = json.dumps(answer).encode()
    handler.reply(200, data[: len(data) // 2], length=len(data))
    handler.hang_up()


def cut_json(handler, answer):
    """Send half of the JSON as if it were all."""
    data = json.dumps(answer).encode()
    handler.reply(200, data[: len(data) // 2])


def silence(handler, answer):
    time.sleep(0.3)
    handler.hang_up()
