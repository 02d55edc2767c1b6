"""A served target: what is sent, what is made of the answers, and what happens when the server misbehaves."""

import logging
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from drafter.artifacts.rows import finish, missing_shards
from drafter.artifacts.storage import Folder
from drafter.data.dialogues import Continuation
from drafter.data.engines import Failure, Limits, Request
from drafter.data.http_client import HttpClient, Refused, Retries, ServerError
from drafter.data.prompts import encode_prompt
from drafter.data.responses import schema, shards, write_responses
from drafter.data.served import OTHER_END, PROMPT_DIFFERS, TEXT_DIFFERS, served_engine
from drafter.models.loading import load_tokenizer
from tests.conftest import finished_rows
from tests.data.stub_server import MODEL, Stub, answer_text, changed, cut_body, cut_json, hang_up, silence, status

TARGET = Path(__file__).parent.parent.parent / "assets" / "tiny-target"
SCHEMA = schema(0.95)
KEY = "sk-a-secret-of-the-test"
FLAVOURS = ["vllm", "sglang", "llama", "text"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TARGET))


@pytest.fixture(scope="module")
def stop(tokenizer):
    return tokenizer.eos_token_id


@pytest.fixture
def serve(tokenizer, stop):
    """Return a function that starts a stub, which ends with the test."""
    started = []

    def start(*flavour, **how):
        started.append(Stub(tokenizer, stop, *flavour, **how))
        return started[-1]

    yield start
    for stub in started:
        stub.close()


class Engines:
    """Make the engine of a stub. Its pauses take no time, and are written down."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.pauses = tokenizer, stop, []

    def __call__(self, stub, faults=(), max_new_tokens=40, key=None, sleep=None, concurrency=4, **how):
        retries = Retries(**({"timeout": 5.0, "retries": 3, "patience": 60.0} | how))
        client = HttpClient(stub.url, key, retries, sleep or self.pauses.append)
        limits, probe = Limits(0.95, max_new_tokens, [self.stop]), encode_prompt(self.tokenizer, "Hello?")
        made = served_engine(client, MODEL, self.tokenizer, limits, 5, probe, concurrency)
        stub.faults += faults  # after the check
        stub.bodies.clear()
        return made


@pytest.fixture
def engine(tokenizer, stop):
    return Engines(tokenizer, stop)


def asked(tokenizer, count=6):
    texts = [f"What is {i} and {i}?" for i in range(count)]
    return [Request(str(i), "k", "train", (0.0, 0.7)[i % 2], encode_prompt(tokenizer, t)) for i, t in enumerate(texts)]


def expected(tokenizer, stop, requests):
    texts = [answer_text(request.prompt_ids, 0) for request in requests]
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], stop] for text in texts]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_responses_are_the_tokens_that_the_server_generated_with_the_stop_token(
    serve, engine, tokenizer, stop, flavour
):
    requests = asked(tokenizer)
    assert engine(serve(flavour))(requests) == expected(tokenizer, stop, requests)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_response_at_the_limit_has_no_stop_token(serve, engine, tokenizer, stop, flavour):
    requests = asked(tokenizer)
    cut = [ids[:3] for ids in expected(tokenizer, stop, requests)]
    assert engine(serve(flavour), max_new_tokens=3)(requests) == cut


def test_the_prompt_is_sent_as_token_ids_with_neutral_sampling(serve, engine, tokenizer, stop):
    stub, requests = serve("vllm"), asked(tokenizer, 2)
    engine(stub, concurrency=1)(requests)
    greedy, sampled = stub.bodies
    assert [body["prompt"] for body in stub.bodies] == [request.prompt_ids for request in requests]
    assert (greedy["temperature"], greedy["top_p"]) == (0.0, 1.0)
    assert (sampled["temperature"], sampled["top_p"]) == (0.7, 0.95)
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    for body in stub.bodies:
        assert neutral.items() <= body.items()
        assert (body["model"], body["stop_token_ids"], body["max_tokens"]) == (MODEL, [stop], 40)
        assert "logprobs" not in body  # absent is off
        assert "ignore_eos" not in body  # SGLang would then ignore the stop tokens too


def test_llama_server_is_asked_without_its_default_samplers(serve, engine, tokenizer):
    stub = serve("llama")
    engine(stub, concurrency=1)(asked(tokenizer, 2))
    for body in stub.bodies:
        assert body["samplers"] == ["temperature", "top_p"]  # in this order
        assert (body["top_k"], body["min_p"], body["repeat_penalty"], body["n_probs"]) == (0, 0.0, 1.0, 0)
        assert (body["return_tokens"], body["cache_prompt"], body["n_predict"]) == (True, False, 40)


def test_seeds_differ_between_requests_and_do_not_depend_on_their_order(serve, engine, tokenizer):
    stub, requests = serve(), asked(tokenizer, 20)
    requests += [request._replace(repetition=1) for request in requests]
    generate = engine(stub)
    generate(requests)
    seeds = {tuple(body["prompt"]): set() for body in stub.bodies}
    for body in stub.bodies:
        seeds[tuple(body["prompt"])].add(body["seed"])
    assert {len(found) for found in seeds.values()} == {2}  # a repetition has another seed
    assert len(set.union(*seeds.values())) == 40
    assert all(0 <= body["seed"] < 2**31 - 1 for body in stub.bodies)
    stub.bodies.clear()
    generate(requests[::-1])
    assert all(body["seed"] in seeds[tuple(body["prompt"])] for body in stub.bodies)


def test_several_requests_are_under_way_on_kept_connections(serve, engine, tokenizer, stop):
    stub, requests = serve(), asked(tokenizer, 24)
    generate = engine(stub, concurrency=4)
    stub.delay, stub.connections = 0.01, 0
    assert generate(requests) == expected(tokenizer, stop, requests)
    assert 2 <= stub.most <= 4
    assert stub.connections <= 4


FAULTS = {
    "the connection is closed": hang_up,
    "the body is cut off": cut_body,
    "the JSON is cut off": cut_json,
    "not JSON": lambda handler, answer: handler.reply(200, b"<html>gateway</html>"),
    "a list": lambda handler, answer: handler.reply(200, [1]),
    "too many requests": status(429),
    "an internal error": status(500),
    "loading": status(503, "Loading model"),
    "no choices": changed(lambda answer: answer.update(choices=[])),
    "no usage": changed(lambda answer: answer.pop("usage")),
    "no reason": changed(lambda answer: answer["choices"][0].update(finish_reason=None)),
    "aborted": changed(lambda answer: answer["choices"][0].update(finish_reason="abort")),
    "no text": changed(lambda answer: answer["choices"][0].update(text=None)),
    "fewer tokens than said": changed(lambda answer: answer["choices"][0].update(token_ids=[5, 6])),
    "cut before the limit": changed(lambda answer: answer["choices"][0].update(finish_reason="length")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_try_is_repeated_and_nothing_is_lost_or_doubled(serve, engine, tokenizer, stop, name):
    stub, requests = serve(), asked(tokenizer)
    found = engine(stub, [FAULTS[name]] * 2)(requests)
    assert found == expected(tokenizer, stop, requests)
    assert len(stub.bodies) == len(requests) + 2
    assert len(engine.pauses) == 2


def test_a_server_that_keeps_silent_is_asked_again(serve, engine, tokenizer, stop):
    stub, requests = serve(), asked(tokenizer, 1)
    assert engine(stub, [silence], timeout=0.1)(requests) == expected(tokenizer, stop, requests)
    assert len(engine.pauses) == 1


def test_pauses_grow_and_are_not_all_alike(serve, engine, tokenizer):
    stub = serve()
    engine(stub, [status(500)] * 6)(asked(tokenizer, 1))
    assert all(0.25 * 2**i <= pause <= 0.5 * 2**i for i, pause in enumerate(engine.pauses))
    assert len(set(engine.pauses)) == 6


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_the_server_asks_for_is_kept(serve, engine, tokenizer, form):
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=25), usegmt=True)
    stub = serve()
    engine(stub, [status(429, headers=[("Retry-After", "25" if form == "seconds" else then)])])(asked(tokenizer, 1))
    assert 23 < engine.pauses[0] <= 25


def test_a_pause_beyond_the_patience_is_an_error_at_once(serve, engine, tokenizer):
    stub = serve()
    with pytest.raises(ServerError, match=r"HTTP 429: slow down\. It asks to wait 3600 s"):
        engine(stub, [status(429, "slow down", [("Retry-After", "3600")])])(asked(tokenizer, 1))
    assert engine.pauses == []


@pytest.mark.parametrize("name", ["no choices", "fewer tokens than said", "the JSON is cut off"])
def test_answers_that_stay_unreadable_are_one_clear_error(serve, engine, tokenizer, name):
    stub = serve()
    with pytest.raises(ServerError, match=r"127.0.0.1:\d+/v1 failed 4 times in a row, .* its answer cannot be used: "):
        engine(stub, [FAULTS[name]] * 4)(asked(tokenizer, 1))
    assert len(stub.bodies) == 4


@pytest.mark.parametrize("code", [400, 404, 422, 501])
def test_a_refused_request_is_an_error_at_once_with_the_servers_message(serve, engine, tokenizer, code):
    stub = serve()
    with pytest.raises(Refused, match=rf"refused .* HTTP {code}: the prompt is too long"):
        engine(stub, [status(code, "the prompt is too long")])(asked(tokenizer, 1))
    assert len(stub.bodies) == 1


def test_an_error_ends_the_other_requests_too(serve, engine, tokenizer):
    stub = serve()
    generate = engine(stub, [status(400, "no")], concurrency=2)
    with pytest.raises(ServerError):
        generate(asked(tokenizer, 200))
    assert len(stub.bodies) < 20


def test_a_server_that_dies_and_comes_back_loses_and_doubles_nothing(serve, engine, tokenizer, stop, tmp_path):
    first, requests, again = serve(), asked(tokenizer, 24), []
    lock, pauses = threading.Lock(), []

    def sleep(seconds):
        with lock:
            pauses.append(seconds)
            if len(pauses) == 5:  # the port refuses connections until now
                again.append(serve("vllm", port=first.port))

    def die(handler, answer):
        handler.hang_up()
        with lock:
            if not first.dead:
                first.close()

    generate = engine(first, [None] * 9 + [die], sleep=sleep)
    folder, parts = Folder(tmp_path), shards(requests, 8)
    how = {"following": Continuation(tokenizer, [stop], 10_000), "known_ids": set(range(len(tokenizer))), "seed": 3}
    write_responses(generate, parts, folder, SCHEMA, **how)
    files, notes = finish(folder, len(parts), SCHEMA)
    rows = finished_rows(folder, files, "respond")
    assert again[0].bodies
    assert all(note["failed"] == {} for note in notes)
    by_id = {row["id"]: row["response_ids"].tolist() for row in rows}
    assert len(rows) == len(by_id) == 24
    assert [by_id[request.id] for request in requests] == expected(tokenizer, stop, requests)


def test_a_server_that_stays_away_is_one_error_and_finished_shards_are_kept(serve, engine, tokenizer, stop, tmp_path):
    stub, requests = serve(), asked(tokenizer, 16)
    generate = engine(stub, [None] * 8 + [hang_up] * 10_000)
    folder, parts = Folder(tmp_path), shards(requests, 8)
    how = {"following": Continuation(tokenizer, [stop], 10_000), "known_ids": set(range(len(tokenizer))), "seed": 3}
    with pytest.raises(ServerError, match=r"failed \d+ times in a row, the last time with RemoteDisconnected"):
        write_responses(generate, parts, folder, SCHEMA, **how)
    assert missing_shards(folder, 2) == [1]
    # The request that gives up first has waited as long as it is patient; each of the four at most one pause longer.
    assert 60 <= sum(engine.pauses) <= 4 * (60 + 30)


def test_a_text_that_does_not_come_back_is_left_out_with_its_reason(serve, engine, tokenizer):
    def shorter(answer):
        answer["choices"][0]["text"] = answer["choices"][0]["text"][:-3]  # such as a special token that is not printed

    found = engine(serve("sglang"), [changed(shorter)], concurrency=1)(asked(tokenizer, 2))
    assert [isinstance(tokens, Failure) for tokens in found] == [True, False]
    assert found[0] == Failure(TEXT_DIFFERS)


def test_a_prompt_that_the_server_reads_differently_is_left_out_with_its_reason(serve, engine, tokenizer):
    fault = changed(lambda answer: answer["usage"].update(prompt_tokens=3))
    found = engine(serve(), [fault], concurrency=1)(asked(tokenizer, 2))
    assert found[0].reason == PROMPT_DIFFERS
    assert found[1]


def test_a_prompt_whose_text_has_other_tokens_is_not_sent_as_text(serve, engine, tokenizer, stop):
    injected = encode_prompt(tokenizer, f"What does {tokenizer.decode([stop])} mean?")
    stub = serve("text")
    found = engine(stub)([Request("a", "k", "train", 0.0, injected)])
    assert found[0].reason == PROMPT_DIFFERS
    assert stub.bodies == []
    assert engine(serve("vllm"))([Request("a", "k", "train", 0.0, injected)])[0]


def test_an_end_that_is_not_the_targets_is_left_out_with_its_reason(serve, engine, tokenizer, stop):
    def other(answer):
        answer["choices"][0]["token_ids"][-1] = stop + 5

    found = engine(serve(), [changed(other)], concurrency=1)(asked(tokenizer, 1))
    assert found[0].reason == OTHER_END


def test_an_omitted_stop_token_is_appended_and_tokens_after_one_are_cut(serve, engine, tokenizer, stop):
    requests = asked(tokenizer, 2)
    faults = [
        changed(lambda answer: answer["choices"][0]["token_ids"].pop()),
        changed(
            lambda answer: (answer["choices"][0]["token_ids"].extend([9]), answer["usage"].update(completion_tokens=99))
        ),
    ]
    whole = expected(tokenizer, stop, requests)
    faults[1] = changed(
        lambda answer: (
            answer["choices"][0]["token_ids"].append(9),
            answer["usage"].update(completion_tokens=answer["usage"]["completion_tokens"] + 1),
        )
    )
    assert engine(serve(), faults, concurrency=1)(requests) == whole


def test_a_context_that_is_too_short_is_an_error_that_says_so(serve, engine, tokenizer):
    def full(answer):
        answer.update(truncated=True, stop_type="limit", tokens=answer["tokens"][:2], tokens_predicted=2)

    with pytest.raises(ServerError, match=r"ran out of context after a prompt of \d+ tokens and 2 of 40 new ones"):
        engine(serve("llama"), [changed(full)])(asked(tokenizer, 1))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_that_adds_a_token_to_the_prompt_is_refused(serve, engine, flavour):
    with pytest.raises(ServerError, match=r"reads a prompt of (\d+) tokens.* it adds a token or a template"):
        engine(serve(flavour, added=1))


@pytest.mark.parametrize("flavour", ["vllm", "llama"])
def test_a_server_with_another_vocabulary_is_refused(serve, engine, flavour):
    stub = serve(flavour)
    stub.faults = [
        changed(lambda answer: (answer.get("choices") or [answer])[0].update(text="unlike", content="unlike"))
    ]
    with pytest.raises(ServerError, match=r"writes 'unlike' for ids .* another tokenizer than target\.path"):
        engine(stub)


def test_ollama_is_refused_with_what_works_instead(serve, engine):
    stub = serve("text")
    stub.faults = [None, changed(lambda answer: answer.update(system_fingerprint="fp_ollama"))]
    with pytest.raises(ServerError, match=r"Ollama's /v1/completions wraps every prompt .* with llama-server"):
        engine(stub)


def test_a_model_that_is_not_served_is_refused_with_those_that_are(serve, engine):
    with pytest.raises(ServerError, match=r"serves a, b, not tiny: set respond\.openai\.model"):
        engine(serve(names=("a", "b")))


def test_an_address_without_v1_is_explained(serve):
    stub = serve()
    client = HttpClient(f"http://127.0.0.1:{stub.port + 0}/v2/v1", None, Retries(5.0, 0, 0.0), lambda _: None)
    stub._server.RequestHandlerClass.do_GET = lambda handler: handler.reply(404, {"error": "File Not Found"})
    with pytest.raises(Refused, match=r"HTTP 404: File Not Found\. The address usually ends with /v1"):
        served_engine(client, MODEL, None, Limits(1.0, 4, [7]), 0, [1])
    client.close()


def test_the_key_is_sent_and_is_in_no_error_and_no_log(serve, engine, tokenizer, caplog):
    stub = serve()
    with caplog.at_level(logging.DEBUG), pytest.raises(Refused, match=r"HTTP 401: wrong key \*\*\*") as refusal:
        engine(stub, [status(500, f"for {KEY}"), status(401, f"wrong key {KEY}")], key=KEY)(asked(tokenizer, 1))
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in stub.headers)
    assert KEY not in str(refusal.value)
    assert KEY not in repr(refusal.getrepr(chain=True))
    assert KEY not in caplog.text
    assert f"{stub.url} serves tiny: prompts are sent as token ids, responses come as token ids" in caplog.text


def test_a_key_that_no_header_can_have_is_refused_without_printing_it():
    with pytest.raises(ValueError, match="API key contains a line break") as refusal:
        HttpClient("http://127.0.0.1:1/v1", f"{KEY}\nmore")
    assert KEY not in str(refusal.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://a/v1", "http://me:secret@a/v1", "http://a/v1?key=secret"])
def test_an_address_that_is_none_or_has_a_secret_in_it_is_refused_without_the_secret(url):
    with pytest.raises(ValueError, match="address of") as refusal:
        HttpClient(url)
    assert "secret" not in str(refusal.value)
