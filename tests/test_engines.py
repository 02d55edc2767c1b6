"""Both engines give each request's tokens up to its stop token; vLLM's is tried on a stand-in with its interface."""

import sys
import types

import pytest
import torch

from drafter.engines import Limits, Request, mixed_engine, transformers_engine, vllm_engine
from drafter.loading import ModelSource
from drafter.speculative import Sampling, autoregressive_decode
from tests.conftest import VOCABULARY, small_model
from tests.test_responses import requests


def of_temperature(greedy):
    return [request for request in requests() if (request.temperature == 0) == greedy]


def test_greedy_answers_in_a_padded_batch_are_each_prompts_own(target):
    engine = transformers_engine(target, Limits(0.95, 12, [7]), batch_tokens=40, first_round=5)
    for request, tokens in zip(of_temperature(True), engine(of_temperature(True)), strict=True):
        assert tokens == autoregressive_decode(target, request.prompt_ids, 12, Sampling(), [7]).tokens


def test_sampled_answers_never_leave_the_top_p_set(target):
    engine = transformers_engine(target, Limits(1e-6, 8, [7]), batch_tokens=100)
    for request, tokens in zip(of_temperature(False), engine(of_temperature(False)), strict=True):
        assert tokens == autoregressive_decode(target, request.prompt_ids, 8, Sampling(), [7]).tokens


def test_temperatures_are_not_mixed_in_a_batch(target):
    mixed = transformers_engine(target, Limits(0.95, 8, [7]), batch_tokens=1000)(requests())
    alone = transformers_engine(target, Limits(0.95, 8, [7]), batch_tokens=1000)(of_temperature(True))
    greedy = [tokens for request, tokens in zip(requests(), mixed, strict=True) if request.temperature == 0]
    assert greedy == alone


def test_an_answer_ends_with_its_first_stop_token(target):
    stops = list(range(0, VOCABULARY, 3))  # so many that most answers meet one
    for tokens in transformers_engine(target, Limits(0.95, 12, stops), 100)(requests()):
        assert all(token not in stops for token in tokens[:-1])
        assert tokens[-1] in stops or len(tokens) == 12


def test_a_mixture_has_each_answer_from_one_engine_whatever_is_asked_beside():
    asked = [Request(str(i), "k", "train", 1.0, [1]) for i in range(400)]
    engine = mixed_engine(
        [lambda rows: [[1, int(row.id)] for row in rows], lambda rows: [[2, int(row.id)] for row in rows]]
    )
    answers = engine(asked)
    assert [tokens[1] for tokens in answers] == list(range(400))
    assert 160 < [tokens[0] for tokens in answers].count(1) < 240
    assert engine(asked[5:9]) == answers[5:9]
    assert engine(asked[:1]) == answers[:1]


@pytest.mark.parametrize("stops", [[], [7, 9]])
def test_any_number_of_stop_tokens_is_fine(target, stops):
    answers = transformers_engine(target, Limits(1.0, 5, stops), 100)(requests()[:2])
    assert all(1 <= len(tokens) <= 5 for tokens in answers)


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_are_refused(greedy):
    broken = small_model(seed=1)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"logits are not finite after \d+ tokens"):
        transformers_engine(broken, Limits(0.9, 4, [7]), 100)(of_temperature(greedy))


class FakeSamplingParams:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class FakeLLM:
    """Answers with the prompt's last token, its request's seed, and a stop token where there is room."""

    made = None

    def __init__(self, **fields):
        FakeLLM.made = fields

    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm
        answers = [
            ([prompt["prompt_token_ids"][-1], how.seed, how.stop_token_ids[0]])[: how.max_tokens]
            for prompt, how in zip(prompts, params, strict=True)
        ]
        self.params = params
        FakeLLM.params = params
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids))]) for ids in answers]


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeSamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


MODEL = ModelSource("some/model", "r1", "bfloat16")


def test_vllm_is_asked_as_it_documents(fake_vllm):
    engine = vllm_engine(MODEL, Limits(0.95, 12, [7, 9]), 5, gpu_memory_utilization=0.8)
    assert FakeLLM.made == {
        "model": "some/model",
        "tokenizer": "some/model",
        "revision": "r1",
        "tokenizer_revision": "r1",
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "seed": 5,
        "gpu_memory_utilization": 0.8,
    }
    torch.manual_seed(100)
    asked = [Request("a", "k", "train", 0.0, [1, 2]), Request("b", "k", "train", 0.7, [3])]
    assert engine(asked) == [[2, 100, 7], [3, 101, 7]]
    greedy, sampled = FakeLLM.params
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, -1)
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.7, 0.95, -1)
    assert sampled.stop_token_ids == [7, 9]
    assert sampled.max_tokens == 12


@pytest.mark.parametrize(("visible", "wanted"), [(None, "1"), ("4,5,6", "5")])
def test_under_torchrun_each_rank_has_its_own_gpu(fake_vllm, monkeypatch, visible, wanted):
    import os

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    vllm_engine(MODEL, Limits(0.95, 12, [7]), 5)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'drafter\[vllm\]'"):
        vllm_engine(MODEL, Limits(0.95, 12, [7]), 5)
