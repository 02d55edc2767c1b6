"""A pair is measured together with an engine that serves it: its counters are pooled, and compared with our τ."""

import json
import shutil

import pytest

from drafter.data.http_client import Retries, ServerError
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.metrics import Estimate
from drafter.models.compatibility import load_drafter
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer
from experiments.reporting.engine_section import EngineFigures, comparison, engine_paragraphs, engine_table
from experiments.running.engine_answers import ASK
from experiments.running.measuring_engine import without_end
from tests.experiments.conftest import PROMPTS
from tests.experiments.engine_stub import SECONDS, EngineStub, Text
from tests.experiments.test_pipeline import stage

GAMMA, LIMIT = 3, 12


@pytest.fixture(scope="module")
def serve(pair):
    """Return a function that serves the pair as an engine does, whose blocks begin after the first token."""
    target, tokenizer = load_target(str(pair / "target")), load_tokenizer(str(pair / "target"))
    drafter = load_drafter(str(pair / "drafter"), str(pair / "target")).requires_grad_(False).eval()
    stops = end_of_turn_ids(str(pair / "target"), tokenizer)

    def decode(ids):
        return tokenizer.decode([one for one in ids if one not in stops])

    def generate(prompt, limit, gamma):
        tokens = autoregressive_decode(target, prompt, DecodingOptions(limit, stop_ids=stops)).tokens
        options = DecodingOptions(limit - 1, stop_ids=stops)
        rest = speculative_decode(target, drafter, [*prompt, tokens[0]], gamma, options) if len(tokens) > 1 else None
        return Text(tokens, [(len(one.drafted), one.accepted) for one in rest.blocks] if rest else [])

    def start(engine, gamma=GAMMA, text=decode, **settings):
        made = (lambda prompt, limit: generate(prompt, limit, gamma)) if gamma else without_blocks
        return EngineStub(engine, made, text, gamma, **settings)

    def without_blocks(prompt, limit):
        return Text(generate(prompt, limit, 1).tokens, [])

    return start


def overrides(pair, out, *more):
    given = {"target.path": f"{pair}/target", "measure.drafter": f"{pair}/drafter", "out": f"{out}"}
    given |= {"measure.prompts": f"{pair}/prompts.jsonl", "measure.largest": "4", "measure.pad": "false"}
    given |= {"measure.rivals": "[]", "measure.decode": "[3]", "measure.max_new_tokens": f"{LIMIT}"}
    return [f"{key}={value}" for key, value in (given | dict(one.split("=", 1) for one in more)).items()]


@pytest.mark.parametrize("engine", ASK)
def test_the_same_pair_in_an_engine_has_the_same_tau(pair, serve, tmp_path, engine):
    with serve(engine) as drafted, serve(engine, gamma=0) as alone:
        given = [f"measure.engine={engine}", f"measure.url={drafted.url}", f"measure.url_alone={alone.url}/v1"]
        stage("measure", overrides(pair, tmp_path / "out", *given))
    assert drafted.prompts[-len(PROMPTS) :] == alone.prompts[-len(PROMPTS) :]
    assert len({tuple(prompt) for prompt in drafted.prompts}) == len(PROMPTS)
    page = (tmp_path / "out" / "measure.md").read_text()
    found = json.loads((tmp_path / "out" / "measure.json").read_text())["engine"]
    assert found["gamma"] == GAMMA
    assert found["equal"] == [len(PROMPTS)] * 2
    assert found["tau"]["value"] == pytest.approx(found["own_tau"])
    assert found["tau"]["low"] <= found["tau"]["value"] <= found["tau"]["high"]
    assert found["ratio"]["value"] == pytest.approx(1)  # all answers take the same time
    assert found["rate"] == found["rate_alone"]
    assert "## The engine's own counters" in page
    assert "τ agrees: " in page


def test_the_pooled_values_are_ratios_of_sums(pair, serve, tmp_path):
    blocks = {0: [(3, 3), (3, 0)], 1: [(3, 1)]}  # of 6 and of 3 tokens, each with a first one
    with serve("vllm") as stub:
        asked = []

        def generate(prompt, limit):
            asked.append(prompt)
            number = len(asked) % 2  # the first one is asked before the others
            return Text([4] * (1 + sum(1 + accepted for _, accepted in blocks[number])), blocks[number])

        stub.generate = generate
        given = ["measure.engine=vllm", f"measure.url={stub.url}", "measure.num_prompts=2", "measure.decode=[2]"]
        stage("measure", overrides(pair, tmp_path / "out", *given))
    found = json.loads((tmp_path / "out" / "measure.json").read_text())["engine"]
    assert found["tau"]["value"] == pytest.approx((5 + 2) / (2 + 1))
    assert (found["tau"]["low"], found["tau"]["high"]) == (2.0, 2.5)
    assert found["accepted"] == pytest.approx((3 + 1) / 9)
    assert found["rate"] == pytest.approx((5 + 2) / (2 * SECONDS))
    assert (found["rate_alone"], found["ratio"], found["own_speedup"]) == (None, None, None)
    page = (tmp_path / "out" / "measure.md").read_text()
    assert "There was no server without the drafter" in page
    assert "(predicted)" in page
    assert found["equal"][0] < 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["measure.url=http://127.0.0.1:1"],
            "measure.url is http://127.0.0.1:1, so measure.engine must be one of llama-",
        ),
        (
            ["measure.engine=ollama", "measure.url=http://127.0.0.1:1"],
            "measure.engine is ollama, must be null or one of",
        ),
        (["measure.engine=vllm"], "measure.url is null: give the address"),
        (["measure.engine=vllm", "measure.url=127.0.0.1:1"], "'127.0.0.1:1' is not the address of a server"),
        (
            ["measure.engine=vllm", "measure.url=http://a", "measure.url_alone=http://a"],
            "measure.url_alone is measure.url, http://a",
        ),
        (
            ["measure.engine=vllm", "measure.url=http://a", "measure.engine_gamma=5"],
            "measure.engine_gamma is 5, must be 1 to measure.largest=4",
        ),
    ],
)
def test_settings_of_an_engine_are_refused_before_it_is_asked(pair, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        stage("measure", overrides(pair, tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refused(pair, tmp_path, monkeypatch):
    """Return a function that runs the command, which must fail before a model is loaded."""
    monkeypatch.setattr("experiments.measure.load_and_time", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("experiments.running.measuring_engine.RETRIES", Retries(retries=0, patience=0.0))

    def run(kind, message, engine, url, *more):
        given = [f"measure.engine={engine}", f"measure.url={url}", *more, "dry_run=true"]
        with pytest.raises(kind, match=message):
            stage("measure", overrides(pair, tmp_path / "out", *given))

    return run


def test_a_trimmed_drafter_is_refused_because_engines_do_not_trim_it(pair, tmp_path):
    shutil.copytree(pair / "drafter", tmp_path / "trimmed")
    (tmp_path / "trimmed" / "kept_tokens.json").write_text("[0, 1, 2]")
    given = ["measure.engine=vllm", "measure.url=http://127.0.0.1:1", f"measure.drafter=ngram+{tmp_path}/trimmed"]
    with pytest.raises(ValueError, match=r"trimmed by its kept_tokens.json. No engine reads it"):
        stage("measure", overrides(pair, tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ASK)
def test_a_server_that_drafts_nothing_is_refused(serve, refused, engine):
    with serve(engine, gamma=0) as stub:
        message = f"{stub.url} drafted nothing in an answer of 12 tokens: measure.url must be a server that was"
        refused(ServerError, message, engine, stub.url)


@pytest.mark.parametrize("engine", ASK)
def test_a_server_of_another_vocabulary_is_refused(serve, refused, engine):
    with serve(engine, text=lambda ids: "something else") as stub:
        refused(ServerError, "writes 'something else' for ids .* another tokenizer than target.path", engine, stub.url)


def test_a_server_that_drafts_where_it_must_not_is_refused(serve, refused):
    with serve("vllm") as one, serve("vllm") as other:
        message = r"drafted \d+ tokens: measure.url_alone must be a server without a drafter"
        refused(ServerError, message, "vllm", one.url, f"measure.url_alone={other.url}")


def test_a_server_that_does_not_answer_is_refused(refused):
    refused(ServerError, r"http://127.0.0.1:9 failed \d times in a row, .*refused", "sglang", "http://127.0.0.1:9")


def test_a_gamma_must_be_known_and_be_one_that_is_predicted(serve, refused):
    with serve("llama-server", metrics=False) as stub:
        refused(ValueError, "measure.engine_gamma is null, and .* does not report γ", "llama-server", stub.url)
    with serve("vllm") as stub:
        message = "measure.engine_gamma is 2, but .* reports γ = 3"
        refused(ValueError, message, "vllm", stub.url, "measure.engine_gamma=2")
        message = "has γ = 3, but measure.largest is 2: set measure.largest=3"
        refused(ValueError, message, "vllm", stub.url, "measure.largest=2", "measure.decode=[1]")


def test_a_gamma_that_the_server_does_not_report_is_given(pair, serve, tmp_path, capsys):
    with serve("llama-server", metrics=False) as stub:
        given = ["measure.engine=llama-server", f"measure.url={stub.url}", "measure.engine_gamma=3", "dry_run=true"]
        stage("measure", overrides(pair, tmp_path / "out", *given))
    assert "can be measured" in capsys.readouterr().out


def figures(**fields):
    known = {
        "engine": "vllm", "gamma": 3, "tau": Estimate(2.0, 1.8, 2.2), "accepted": 0.4, "drafts_per_call": 2.9,
        "rate": 30.0, "rate_alone": 20.0, "ratio": Estimate(1.5, 1.3, 1.7), "own_tau": 2.01,
        "own_speedup": Estimate(1.2, 1.1, 1.3), "own_prediction": 1.25, "equal": (4, 4),
    }  # fmt: skip
    return EngineFigures(**known | fields)


def test_the_comparison_names_what_can_be_the_reason():
    assert comparison(figures()) == "τ agrees: 2.00 in the engine, 2.01 here."
    differs = comparison(figures(own_tau=2.2))
    assert differs.startswith("τ differs: 2.00 in the engine, 2.20 here. The acceptance rule is no reason")
    assert "the server's drafter are rounded in another way" in differs
    assert "3 of 4 texts are others" in comparison(figures(own_tau=2.2, equal=(1, 4)))
    fewer = comparison(figures(own_tau=2.2, drafts_per_call=1.5))
    assert "vLLM drafts 1.5 tokens per target call and not 3" in fewer


def test_the_table_has_the_engine_and_this_project():
    rows = engine_table(figures()).rows
    assert rows[0] == ["vLLM", "2.00 [1.80, 2.20]", "40%", "30.0", "20.0", "1.50 [1.30, 1.70]"]
    assert rows[1] == ["this project", "2.01", "", "", "", "1.20 [1.10, 1.30]"]
    alone = engine_table(figures(rate_alone=None, ratio=None, own_speedup=None)).rows
    assert (alone[0][-2:], alone[1][-1]) == (["", ""], "1.25 (predicted)")
    assert len(engine_paragraphs(figures())) == 3


def test_the_end_of_a_text_does_not_make_it_another():
    assert without_end([4, 0], {0}) == without_end([4], {0}) == [4]
    assert without_end([], {0}) == []
