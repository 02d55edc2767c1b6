"""What llama-server, vLLM and SGLang count about an answer, read from their documented forms."""

import pytest

from drafter.data.engines import Limits
from drafter.data.http_client import HttpClient, Retries, ServerError, UnreadableAnswer
from experiments.running.engine_answers import (
    ASK,
    SGLANG_DRAFTS,
    Answer,
    decoding_counts,
    llama_answer,
    read_sglang,
    read_vllm_counters,
    reported_gamma,
    sglang_answer,
)
from tests.experiments.engine_stub import SECONDS, EngineStub, Text

# Six tokens: the first one, and two blocks of 3 drafts, of which 2 and 1 are accepted.
TEXT = Text([5, 6, 7, 8, 9, 10], [(3, 2), (3, 1)])
LIMITS, PROMPT = Limits(1.0, 6, [0]), [1, 2, 3, 4]


def ask(stub, gamma=3):
    client = HttpClient(stub.url, limits=Retries(retries=1, patience=0.0), sleep=lambda _: None)
    try:
        return ASK[stub.engine](client, PROMPT, LIMITS, gamma)
    finally:
        client.close()


def gamma_of(stub, answer):
    client = HttpClient(stub.url)
    try:
        return reported_gamma(stub.engine, client, answer)
    finally:
        client.close()


def serve(engine, text=TEXT, gamma=3, **settings):
    return EngineStub(engine, lambda prompt, limit: text, lambda ids: " ".join(map(str, ids)), gamma, **settings)


@pytest.mark.parametrize("engine", ASK)
def test_the_counts_of_an_answer_are_those_of_its_blocks(engine):
    with serve(engine) as stub:
        ask(stub)  # counters of earlier requests do not matter
        answer = ask(stub)
        assert gamma_of(stub, answer) == 3
    assert answer._replace(seconds=0.0) == Answer(TEXT.tokens, 6, 0.0, SECONDS, 2, 6, 3, "5 6 7 8 9 10")
    assert stub.prompts == [PROMPT, PROMPT]
    found = decoding_counts(answer, None)
    assert (found.tokens, found.target_calls, found.accepted, found.drafted, found.seconds) == (5, 2, 3, 6, SECONDS)


@pytest.mark.parametrize("engine", ASK)
def test_without_a_drafter_each_token_but_the_first_has_a_target_call(engine):
    with serve(engine, Text(TEXT.tokens, []), gamma=0) as stub:
        answer = ask(stub, gamma=0)
    assert (answer.target_calls, answer.drafted, answer.accepted) == (5, 0, 0)
    assert decoding_counts(answer, answer).baseline_tokens == 5


def answer(tokens, **timings):
    found = {"prompt_n": 7, "predicted_n": tokens, "predicted_ms": 500.0, **timings}
    return {"tokens": list(range(tokens)), "timings": found}


@pytest.mark.parametrize(
    ("found", "gamma", "calls"),
    [
        # Of 16 tokens the first is the prompt's; 15 come from blocks, 5 of them drafted.
        (answer(16, draft_n=28, draft_n_accepted=5), 3, 10),
        # The last blocks before the limit are shorter, which the number of drafts would count wrongly.
        (answer(16, draft_n=22, draft_n_accepted=5), 3, 10),
        # Ended by itself: 4 blocks of 3 drafts; the end is a draft, which is not counted as accepted.
        (answer(9, draft_n=12, draft_n_accepted=4), 3, 4),
        (answer(9), 0, 8),
        (answer(1), 3, 0),
    ],
)
def test_target_calls_follow_from_what_llama_server_counts(found, gamma, calls):
    one = llama_answer(found, 2.0, gamma, length=16, prompt=7)
    assert one.target_calls == calls
    assert (one.seconds, one.decoding_seconds) == (2.0, 0.5)


def test_a_kept_prompt_and_a_server_that_does_not_draft_are_refused():
    with pytest.raises(ServerError, match="read 2 of 7 prompt tokens"):
        llama_answer(answer(9, prompt_n=2), 2.0, 0, 16, 7)
    with pytest.raises(ServerError, match="drafted nothing in a text of 9 tokens"):
        llama_answer(answer(9), 2.0, 3, 16, 7)


def test_a_full_context_and_an_answer_without_timings_are_refused(monkeypatch):
    with serve("llama-server") as stub:
        monkeypatch.setattr("tests.experiments.engine_stub.llama", lambda *_: {"tokens": [1], "content": "a"})
        with pytest.raises(ServerError, match="without timings or tokens: take a newer llama-server"):
            ask(stub)
        cut = answer(3) | {"truncated": True}
        monkeypatch.setattr("tests.experiments.engine_stub.llama", lambda *_: cut)
        with pytest.raises(ServerError, match="ran out of context"):
            ask(stub)


def test_vllms_counters_may_be_late_and_are_no_one_elses():
    with serve("vllm", lag=1) as stub:
        assert ask(stub).drafted == 6
    with (
        serve("vllm", lag=9) as stub,
        pytest.raises(ServerError, match="counters with 0 of 6 new tokens"),
    ):
        ask(stub)
    with (
        serve("vllm", others=2) as stub,
        pytest.raises(ServerError, match=r"generated 8 tokens during an answer of 6: .* nobody else may use it"),
    ):
        ask(stub)


def test_metrics_of_something_else_are_unreadable():
    with pytest.raises(UnreadableAnswer, match="no counter vllm:generation_tokens in /metrics"):
        read_vllm_counters("llamacpp:tokens_predicted_total 4\n")


@pytest.mark.parametrize(("change", "message"), [({"token_ids": None}, "returned no token ids")])
def test_a_vllm_that_returns_no_ids_is_refused(monkeypatch, change, message):
    from tests.experiments import engine_stub

    whole = engine_stub.vllm

    def changed(*given):
        found = whole(*given)
        found["choices"][0] |= change
        return found

    monkeypatch.setattr(engine_stub, "vllm", changed)
    with serve("vllm") as stub, pytest.raises(ServerError, match=message):
        ask(stub)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_that_reads_other_tokens_is_refused(monkeypatch, engine):
    from tests.experiments import engine_stub

    whole = getattr(engine_stub, engine)
    monkeypatch.setattr(engine_stub, engine, lambda prompt, *rest: whole([0, *prompt], *rest))
    with serve(engine) as stub, pytest.raises(ServerError, match="read 5 prompt tokens where 4 were sent"):
        ask(stub)


@pytest.mark.parametrize(("drafted", "accepted"), SGLANG_DRAFTS)
def test_sglangs_counts_have_other_names_in_other_versions(drafted, accepted):
    meta = {"prompt_tokens": 4, "completion_tokens": 6, "e2e_latency": 0.5, "spec_verify_ct": 2}
    found = read_sglang({"text": "a", "output_ids": [1], "meta_info": meta | {drafted: 6, accepted: 3}})
    assert sglang_answer(found, 1.0)[1:7] == (6, 1.0, 0.5, 2, 6, 3)
    with pytest.raises(UnreadableAnswer, match="meta_info without spec_num_proposed_drafts"):
        read_sglang({"text": "a", "output_ids": [1], "meta_info": meta})
    with pytest.raises(UnreadableAnswer, match="no output_ids, or no meta_info with completion_tokens"):
        read_sglang({"text": "a", "meta_info": meta})


def test_a_gamma_that_is_not_reported_is_none():
    uneven = Answer([1], 6, 1.0, 1.0, 2, 5, 3)
    assert reported_gamma("sglang", None, uneven) is None
    with serve("llama-server", metrics=False) as stub:
        assert gamma_of(stub, uneven) is None
