"""Tasks sample as their settings say, and only settings that limit something enter the identity of an evaluation."""

import pytest
from omegaconf import OmegaConf

from drafter.warping import Sampling
from experiments.running.tasks import check_tasks, decoding_settings, options_of

SETTINGS = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 8, "in_domain": True}


def task(**more):
    return OmegaConf.create({**SETTINGS, **more})


def test_top_k_comes_from_the_task_unless_it_is_overridden():
    assert options_of("chat", task(), {}).sampling == Sampling(0.6, 0.95, 0)
    assert options_of("chat", task(top_k=20), {}).sampling == Sampling(0.6, 0.95, 20)
    assert options_of("chat", task(top_k=20), {"top_k": 5}).sampling == Sampling(0.6, 0.95, 5)
    assert options_of("chat", task(), {"temperature": 1.0, "top_k": 5}).sampling == Sampling(1.0, 0.95, 5)


@pytest.mark.parametrize("value", [-1, 2.5, True, None])
def test_a_wrong_top_k_is_refused_by_the_name_of_its_task(value):
    with pytest.raises(ValueError, match=f"task.chat: top_k is {value}, must be a whole number: 1 or above, or 0 for"):
        options_of("chat", task(top_k=value), {})


def test_an_unknown_override_is_refused():
    with pytest.raises(ValueError, match=r"evaluate.sampling has \['topk'\], it takes temperature, top_p, top_k"):
        options_of("chat", task(), {"topk": 20})


def test_top_k_identifies_an_evaluation_only_if_it_limits_the_tokens():
    def identity(**more):
        cfg = OmegaConf.create({"task": {"chat": {**SETTINGS, **more}}, "seed": 1, "target": {"dtype": "float32"}})
        return decoding_settings(cfg)["tasks"]["chat"]

    assert identity() == identity(top_k=0) == SETTINGS
    assert identity(top_k=20) == {**SETTINGS, "top_k": 20}


def test_every_task_is_checked():
    check_tasks(OmegaConf.create({"task": {"a": task(), "b": task()}}), {})
    with pytest.raises(ValueError, match=r"task\.b: max_new_tokens is 0, must be at least 1"):
        check_tasks(OmegaConf.create({"task": {"a": task(), "b": task(max_new_tokens=0)}}), {})
