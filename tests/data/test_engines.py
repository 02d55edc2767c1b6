"""Both engines return the tokens of each request up to its stop token. vLLM is replaced by a stub of its interface."""

import json
import logging
import os
import sys
import types
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from transformers import GenerationConfig
from transformers.generation import CompileConfig

from drafter.data.engines import (
    Limits,
    Request,
    ignored_settings,
    mixed_engine,
    request_seed,
    rounds_engine,
    transformers_engine,
    vllm_engine,
)
from drafter.data.padded import Way, way_of
from drafter.data.responses import Instruction, plan, shards
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode
from drafter.models.source import ModelSource
from drafter.ranks import Ranks
from experiments.running.responding import engine, log_ignored_settings
from tests.conftest import VOCABULARY, save_target, small_model
from tests.data.test_responses import requests
from tests.families import family

# Values for the fields of a generation config that would change what is generated, or how it is returned.
TRUE = "early_stopping do_sample use_mtp renormalize_logits remove_invalid_values token_healing output_attentions "
TRUE += (
    "output_hidden_states output_scores output_logits return_dict_in_generate is_assistant disable_compile low_memory"
)
PARTS = "temperature top_p top_h min_p typical_p epsilon_cutoff eta_cutoff penalty_alpha assistant_ensemble_weight "
PARTS += "max_time assistant_confidence_threshold"
LISTS = {
    "stop_strings": ["a"],
    "bad_words_ids": [[12]],
    "suppress_tokens": [14, 15],
    "begin_suppress_tokens": [16],
    "sequence_bias": [[[17], -10.0]],
    "exponential_decay_length_penalty": [2, 3.0],
    "force_words_ids": [[18]],
    "constraints": [1],
}
VALUES = {
    **dict.fromkeys(TRUE.split(), True),
    **dict.fromkeys(PARTS.split(), 0.3),
    **LISTS,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "compile_config": CompileConfig(),
    "num_assistant_tokens_schedule": "heuristic",
    "speculation_type": "dflash",
    "dola_layers": "high",
    "watermarking_config": {"bias": 5.0},
    "num_return_sequences": 2,  # at most num_beams
}
# The first one warns when it is constructed; the others do not affect what is generated.
SKIPPED = {"continuous_batching_config", "transformers_version", "_from_model_config"}


ENGINES = pytest.mark.parametrize(
    "make", [transformers_engine, partial(rounds_engine, first_round=5)], ids=["beside", "rounds"]
)


def of_temperature(greedy):
    return [request for request in requests() if (request.temperature == 0) == greedy]


@ENGINES
def test_greedy_responses_in_a_padded_batch_equal_those_of_single_prompts(target, make):
    engine = make(target, Limits(0.95, 12, [7]), 40)
    for request, tokens in zip(of_temperature(True), engine(of_temperature(True)), strict=True):
        assert tokens == autoregressive_decode(target, request.prompt_ids, DecodingOptions(12, stop_ids=[7])).tokens


@ENGINES
def test_samples_stay_in_the_top_p_set(target, make):
    engine = make(target, Limits(1e-6, 8, [7]), 100)
    for request, tokens in zip(of_temperature(False), engine(of_temperature(False)), strict=True):
        assert tokens == autoregressive_decode(target, request.prompt_ids, DecodingOptions(8, stop_ids=[7])).tokens


@ENGINES
def test_each_response_has_the_temperature_of_its_request(target, make):
    mixed = make(target, Limits(0.95, 8, [7]), 1000)(requests())
    alone = make(target, Limits(0.95, 8, [7]), 1000)(of_temperature(True))
    greedy = [tokens for request, tokens in zip(requests(), mixed, strict=True) if request.temperature == 0]
    assert greedy == alone


@ENGINES
def test_a_response_ends_with_its_first_stop_token(target, make):
    stops = list(range(0, VOCABULARY, 3))  # so many that most responses reach one
    for tokens in make(target, Limits(0.95, 12, stops), 100)(requests()):
        assert all(token not in stops for token in tokens[:-1])
        assert tokens[-1] in stops or len(tokens) == 12


@pytest.mark.parametrize(
    ("kind", "batches", "pads"),
    [("rwkv", False, False), ("minimax", True, False), ("recurrent_gemma", True, False), ("lfm2", True, True)],
)
def test_a_target_with_states_responds_as_without_a_cache_whatever_its_padding_would_do(kind, batches, pads):
    target = family(kind)
    assert way_of(target) == Way(batches, pads, caches=True)
    prompts = [[3, 5, 7, 9, 11, 2, 4], [13, 8, 6], [21, 22, 23, 24, 25], [9, 8, 7], [6]]
    asked = [Request(str(number), "k", "train", 0.0, prompt) for number, prompt in enumerate(prompts)]
    for prompt, tokens in zip(prompts, transformers_engine(target, Limits(1.0, 20, []), 100)(asked), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 20:
            ids.append(int(target(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert tokens == ids[len(prompt) :]
        assert len(set(tokens)) > 2


def test_a_target_whose_cache_is_wrong_responds_without_it(monkeypatch):
    target, errors = small_model(1), {True: 2.0, False: 0.1}
    monkeypatch.setattr("drafter.data.padded._error", lambda _, way: errors[way.caches])
    assert way_of(target) == Way(batches=False, pads=False, caches=False)
    errors[False] = 3.0
    with pytest.raises(ValueError, match="LlamaForCausalLM does not generate the text of its own logits"):
        way_of(small_model(1))


def test_a_mixture_chooses_the_engine_of_a_request_by_its_id_alone():
    asked = [Request(str(i), "k", "train", 1.0, [1]) for i in range(400)]
    engine = mixed_engine(
        [lambda rows: [[1, int(row.id)] for row in rows], lambda rows: [[2, int(row.id)] for row in rows]]
    )
    answers = engine(asked)
    assert [tokens[1] for tokens in answers] == list(range(400))
    # Four standard deviations of a fair choice between the engines are 40.
    assert 160 < [tokens[0] for tokens in answers].count(1) < 240
    assert engine(asked[5:9]) == answers[5:9]
    assert engine(asked[:1]) == answers[:1]


@ENGINES
@pytest.mark.parametrize("stops", [[], [7, 9]])
def test_there_may_be_any_number_of_stop_tokens(target, stops, make):
    answers = make(target, Limits(1.0, 5, stops), 100)(requests()[:2])
    assert all(1 <= len(tokens) <= 5 for tokens in answers)


@ENGINES
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_are_refused(greedy, make):
    broken = small_model(seed=1)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"logits are not finite after \d+ tokens"):
        make(broken, Limits(0.9, 4, [7]), 100)(of_temperature(greedy))


@pytest.fixture(scope="module")
def configured():
    """Return a model with the weights of `target` and with all fields of its generation config set."""
    model = small_model(seed=1, hidden=32, layers=2, sharpness=60.0)
    fields = {name: VALUES.get(name, 3) for name in vars(GenerationConfig()) if name not in SKIPPED}
    assert set(VALUES) <= set(fields)
    model.generation_config = GenerationConfig(**fields)
    model.generate = None  # like a checkpoint whose code overrides `generate`
    return model


@ENGINES
def test_no_field_of_the_checkpoints_generation_config_changes_greedy_responses(configured, make):
    kept, asked = configured.generation_config, of_temperature(True)
    answers = make(configured, Limits(0.95, 12, [7]), 40)(asked)
    for request, tokens in zip(asked, answers, strict=True):
        options = DecodingOptions(12, stop_ids=[7])
        assert tokens == autoregressive_decode(configured, request.prompt_ids, options).tokens
    assert configured.generation_config is kept


@ENGINES
def test_no_field_of_the_checkpoints_generation_config_changes_samples(target, configured, make):
    found = []
    for model in (target, configured):
        torch.manual_seed(5)
        found.append(make(model, Limits(0.9, 12, [7]), 100)(of_temperature(False) * 20))
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) > len(of_temperature(False))


def test_ignored_settings_of_a_generation_config_are_logged(tmp_path, caplog):
    save_target(tmp_path)
    with caplog.at_level(logging.INFO):
        log_ignored_settings(str(tmp_path))
    assert not caplog.messages
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.1, "top_k": 20}))
    assert ignored_settings(str(tmp_path)) == {"repetition_penalty": 1.1, "top_k": 20}
    with caplog.at_level(logging.INFO):
        log_ignored_settings(str(tmp_path))
    assert f"of {tmp_path} sets top_k=20, repetition_penalty=1.1: these are not applied" in caplog.text
    file.unlink()
    assert ignored_settings(str(tmp_path)) == {}


def test_reference_answers_without_an_end_of_text_are_refused():
    cfg = OmegaConf.create({"respond": {"by": "reference"}, "target": {"path": "some/model"}})
    with pytest.raises(ValueError, match=r"respond\.by=reference: some/model names no end of text"):
        engine(cfg, Limits(0.95, 8, []), Ranks(0, 1, torch.device("cpu")), tokenizer=None)


class FakeSamplingParams:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class FakeLLM:
    """Return the last token of the prompt, the seed of the request, and a stop token if the limit allows it."""

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
    module.LLM, module.SamplingParams = FakeLLM, FakeSamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


MODEL = ModelSource("some/model", "r1", "bfloat16")


def test_vllm_gets_the_arguments_of_its_documentation(fake_vllm):
    engine = vllm_engine(MODEL, Limits(0.95, 12, [7, 9]), 5, gpu_memory_utilization=0.8)
    assert FakeLLM.made == {
        "model": "some/model",
        "tokenizer": "some/model",
        "revision": "r1",
        "tokenizer_revision": "r1",
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "seed": 5,
        "generation_config": "vllm",
        "gpu_memory_utilization": 0.8,
    }
    asked = [Request("a", "k", "train", 0.0, [1, 2]), Request("b", "k", "train", 0.7, [3])]
    assert engine(asked) == [[2, request_seed(5, asked[0]), 7], [3, request_seed(5, asked[1]), 7]]
    greedy, sampled = FakeLLM.params
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, -1)
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.7, 0.95, -1)
    assert sampled.stop_token_ids == [7, 9]
    assert sampled.ignore_eos  # vLLM does not add the ends of text that it reads itself
    assert sampled.max_tokens == 12


def test_each_request_has_a_seed_that_does_not_depend_on_its_shard():
    rows = [{"id": f"source-{i}", "kind": "k", "split": "train"} for i in range(500)]
    asked = plan([Instruction(row, None, [1]) for row in rows], [0.3, 0.7], 3000)
    seeds = [request_seed(seed, request) for seed in (0, 1) for part in shards(asked, 64) for request in part]
    assert len(set(seeds)) == len(seeds) == 6000
    assert all(0 <= one < 2**63 for one in seeds)
    assert [request_seed(0, one) for part in shards(asked, 1000) for one in part] == seeds[:3000]


@pytest.mark.parametrize(("visible", "expected"), [("", "1"), ("4,5,6", "5")])
def test_under_torchrun_each_rank_has_its_own_gpu(fake_vllm, monkeypatch, visible, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    vllm_engine(MODEL, Limits(0.95, 12, [7]), 5)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[vllm\]'"):
        vllm_engine(MODEL, Limits(0.95, 12, [7]), 5)
