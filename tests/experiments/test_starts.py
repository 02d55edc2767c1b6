"""Each start of conf/init gives a drafter of the shape that was checked before, and a wrong one is refused in time."""

import numpy as np
import pytest
import torch

from drafter.models.compatibility import VocabularyError
from drafter.models.loading import load_model, load_target, load_tokenizer, meta_model
from experiments.pretrain import check
from experiments.running.inputs import target_source
from experiments.running.starts import empty_drafter, new_drafter, start_identity
from tests.experiments.test_configs import compose_config, hydra_session  # noqa: F401
from tests.models.test_initialization import byte_level, gpt2

IDS = torch.arange(2, 12)[None]
ROTARY = "+drafter.rope_parameters={rope_type: default, rope_theta: 100000000.0}"
COPYING = ["init=copying", "drafter.hidden_size=64", "+drafter.head_dim=64", "drafter.model_type=qwen3", ROTARY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small model of the tiny target's vocabulary, one of another, and held-out text."""
    folder = tmp_path_factory.mktemp("starts")
    tokenizer = load_tokenizer("assets/tiny-target")
    with torch.random.fork_rng():
        gpt2(tokenizer).save_pretrained(folder / "sibling")
    tokenizer.save_pretrained(folder / "sibling")
    other = byte_level(280)
    gpt2(other).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    (folder / "run" / "data").mkdir(parents=True)
    for split in ("heldout", "train"):
        np.save(folder / "run" / "data" / f"{split}.npy", np.arange(1024, dtype=np.uint16))
    return folder


def config(folder, *overrides):
    return compose_config("pretrain", "scale=smoke", "logger=csv", f"root={folder}/run", *overrides)


def make(folder, *overrides):
    cfg = config(folder, *overrides)
    empty = empty_drafter(cfg, meta_model(target_source(cfg)))
    made = new_drafter(cfg, load_tokenizer(target_source(cfg)))
    assert made.num_parameters() == empty.num_parameters()
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in empty.state_dict().items()
    }
    assert made.training
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    return made


@pytest.mark.parametrize(
    "overrides",
    [
        ["init=scratch"],
        ["init=existing", "init.path={folder}/sibling"],
        ["init=layers", "init.layers=[0,-1]"],
        ["init=layers", "init.layers=[0,1]", "init.hidden_size=48"],
        ["init=projected"],
        COPYING,
        ["init=transplant", "init.path={folder}/other"],
    ],
    ids=["scratch", "existing", "layers", "narrower layers", "projected", "copying", "transplant"],
)
def test_every_start_has_the_shape_that_was_checked(folder, overrides):
    made = make(folder, *(one.replace("{folder}", str(folder)) for one in overrides))
    assert made(input_ids=IDS).logits.shape[-1] == load_target("assets/tiny-target").config.vocab_size


def test_an_existing_model_is_the_drafter_as_it_is(folder):
    made = make(folder, "init=existing", f"init.path={folder}/sibling").eval()
    assert torch.equal(made(input_ids=IDS).logits, load_model(f"{folder}/sibling").eval()(input_ids=IDS).logits)


def test_all_layers_of_the_target_are_the_target(folder):
    target = load_target("assets/tiny-target")
    every = list(range(target.config.num_hidden_layers))
    made = make(folder, "init=layers", f"init.layers={every}").eval()
    assert torch.equal(made(input_ids=IDS).logits, target(input_ids=IDS).logits)


def test_the_identity_of_a_start_is_its_settings_and_the_model_that_it_is_made_from(folder):
    scratch, made_of = start_identity(config(folder))
    assert set(scratch) == {"drafter"}  # as before there was a choice: earlier runs stay valid
    assert not made_of
    existing = config(folder, "init=existing", f"init.path={folder}/sibling")
    settings, made_of = start_identity(existing)
    assert settings == {"init": {"kind": "existing"}}
    assert set(made_of) == {"init"}
    first, second = (start_identity(config(folder, "init=layers", f"init.layers=[{n}]"))[0] for n in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("overrides", "error", "problem"),
    [
        (["init=layers", "init.layers=[0,40]"], ValueError, "no layer 40"),
        (["init=layers", "init.hidden_size=4096"], ValueError, "hidden size is 4096"),
        (
            ["init=layers", "init.hidden_size=32"],
            ValueError,
            "multiple of the target.*s 6 attention heads.*give 30 or 36",
        ),
        (["init=projected", "drafter.hidden_size=4096"], ValueError, "hidden size is 4096, and init=projected takes"),
        (
            [*COPYING, "drafter.num_hidden_layers=1"],
            ValueError,
            "init=copying: the drafter must have two layers or more",
        ),
        (["init=existing", "init.path={folder}/other"], VocabularyError, "is no drafter for assets/tiny-target"),
        (["init.kind=magic"], ValueError, "init.kind is 'magic', must be one of scratch"),
    ],
)
def test_a_start_that_does_not_suit_the_target_is_refused_before_training(folder, overrides, error, problem):
    with pytest.raises(error, match=problem):
        check(config(folder, *(one.replace("{folder}", str(folder)) for one in overrides)))


def test_a_drafter_of_another_vocabulary_is_told_of_the_transplant(folder):
    with pytest.raises(VocabularyError, match="init=transplant"):
        check(config(folder, "init=existing", f"init.path={folder}/other"))
