import json
import re
import stat
import sys

import pytest

from benchmarks import engines
from benchmarks.engine_processes import Settings, llama_arguments, openvino_answer

NEW = "-md, --model-draft FNAME  --spec-draft-n-max N  --spec-draft-n-min N  --spec-draft-p-min, --draft-p-min P"
NEW += "  --spec-type none,draft-simple,ngram-simple  -cram, --cache-ram N"
OLD = "-md, --model-draft FNAME  --draft-max, --draft N  --draft-min N  --draft-p-min P"


def settings(exact=False):
    return Settings(2, 300, 16, exact, [0], None)


def values(arguments):
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


@pytest.mark.parametrize(("usage", "prefix"), [(NEW, "--spec-draft"), (OLD, "--draft")])
def test_options_have_the_names_of_the_binarys_version(usage, prefix):
    found = values(llama_arguments(usage, "drafter.gguf", 5, settings()))
    most, least = (f"{prefix}-n-{name}" if usage is NEW else f"{prefix}-{name}" for name in ("max", "min"))
    assert (found[most], found[least], found[f"{prefix}-p-min"]) == ("5", "0", "0")
    assert found["--model-draft"] == "drafter.gguf"
    assert ("--spec-type" in found, "--cache-ram" in found) == (usage is NEW, usage is NEW)
    assert found.keys() >= values(llama_arguments(usage, None, 0, settings())).keys()


def test_a_binary_that_cannot_draft_is_refused():
    with pytest.raises(ValueError, match="has no option --spec-draft-n-max or --draft-max"):
        llama_arguments("--model-draft FNAME  --draft-maximum N", "drafter.gguf", 5, settings())


def test_exact_sets_the_cache_of_both_models():
    found = values(llama_arguments(NEW, "drafter.gguf", 5, settings(exact=True)))
    assert {found[name] for name in ("-ctk", "-ctv", "-ctkd", "-ctvd")} == {"f32"}
    assert found["--flash-attn"] == "off"
    assert "-ctkd" not in llama_arguments(NEW, None, 0, settings(exact=True))


def test_openvinos_accepted_drafts_follow_from_its_calls():
    found = {"tokens": list(range(10)), "target_calls": 6, "drafted": 14, "accepted": 2}
    one = openvino_answer(found | {"seconds": 2.0, "decoding_seconds": 1.5})
    assert (one.target_calls, one.accepted, one.drafted) == (5, 4, 14)


# Answers as llama-server does, with the prompt's first ids as its text, and writes down who was asked.
SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--help" in sys.argv:
    sys.exit(print("{usage}"))
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
gamma = int(options.get("--spec-draft-n-max", 0))
if "broken" in options["-m"]:
    sys.exit("no such architecture")

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({{"status": "ok"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/detokenize":
            return self.reply({{"content": {text}}})
        with open("{asked}", "a") as file:
            print(options["-m"].rpartition("/")[2], gamma, len(body["prompt"]), file=file)
        tokens = (body["prompt"] * 9)[: body["n_predict"]]
        timings = {{"prompt_n": len(body["prompt"]), "predicted_n": len(tokens), "predicted_ms": 20.0 - gamma}}
        if gamma:
            timings |= {{"draft_n": 3, "draft_n_accepted": 2}}
        self.reply({{"tokens": tokens, "timings": timings}})

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass

HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that runs the command with a program in the place of llama-server."""

    def run(*more, target="target.gguf", text=engines.SAMPLE):
        for name in (target, "drafter.gguf"):
            (tmp_path / name).touch()
        rows = [{"prompt": "What is a list?", "task": "a"}, {"prompt": "What is a dictionary?", "task": "b"}]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        binary = tmp_path / "llama-server"
        binary.write_text(SERVER.format(python=sys.executable, usage=NEW, asked=tmp_path / "asked", text=repr(text)))
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        files = {"binary": binary, "target": tmp_path / target, "drafter": tmp_path / "drafter.gguf"}
        files |= {"prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out", "tokenizer": "assets/tiny-target"}
        options = [part for name, value in files.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["engines", "--engine", "llama-server", *options, *more])
        engines.main()
        return [line.split() for line in (tmp_path / "asked").read_text().splitlines()]

    return run


def test_each_prompt_goes_to_all_processes_in_turn(command, tmp_path, capsys):
    asked = command("--gammas", "3", "2", "--length", "6", "--repeats", "2")
    every = [["drafter.gguf", "0"], ["target.gguf", "0"], ["target.gguf", "2"], ["target.gguf", "3"]]
    rounds = [asked[start : start + 4] for start in range(0, len(asked), 4)]
    assert [sorted(one[:2] for one in found) for found in rounds] == [every] * 5  # the first warms up
    assert [len({one[2] for one in found}) for found in rounds] == [1] * 5  # the same prompt
    assert len({tuple(one[0] + one[1] for one in found) for found in rounds[1:]}) > 1  # in another order
    written = json.loads((tmp_path / "out" / "engines-llama-server.json").read_text())
    assert len(written["measurements"]) == 16
    pooled = written["summaries"][-1]
    assert (pooled["task"], pooled["gamma"], pooled["prompts"]) == ("all", 3, 2)
    assert pooled["ratio"]["value"] == pytest.approx(20 / 17)
    assert pooled["tau"]["value"] == 5 / 3
    assert pooled["differences"] == []
    assert "| all | 3 | 2 |" in capsys.readouterr().out
    assert "| all | 3 | 2 |" in (tmp_path / "out" / "engines-llama-server.md").read_text()


def test_a_server_that_does_not_start_and_another_vocabulary_are_refused(command):
    with pytest.raises(SystemExit, match=r"did not start:\nno such architecture"):
        command(target="broken.gguf")
    with pytest.raises(SystemExit, match=r"--tokenizer assets/tiny-target is not that of --target .*: the same ids"):
        command(text="Another text")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gammas", "0"], r"--gammas are \[0\], must be at least 1"),
        (["--length", "1"], "--length is 1, must be at least 2"),
        (["--binary", "no-such-server"], "--binary is 'no-such-server', which is not an installed command"),
        (["--target", "assets"], "--target is 'assets', must be a GGUF file"),
        (["--engine", "openvino", "--target", "assets"], "must be a directory with an openvino_model.xml"),
        (["--drafter", "nowhere.gguf"], "--drafter is 'nowhere.gguf', which does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(command, capsys, more, message):
    with pytest.raises(SystemExit):
        command(*more)
    assert re.search(message, capsys.readouterr().err)


def test_prompts_that_do_not_fit_are_refused(command):
    with pytest.raises(SystemExit, match=r"the longest prompt has .* tokens: with --length it needs .* of 512 tokens"):
        command("--length", "510")
