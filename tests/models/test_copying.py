"""Heads that copy continue a repeated text before any training, and training leaves them as they are."""

import pytest
import torch

from drafter.models.copying import add_copying_heads, check_can_copy, copying_weights
from drafter.models.initialization import build_drafter
from drafter.training.held import hold
from drafter.training.optimizers import Optimization, adamw, muon

VOCABULARY = 300


def drafter(**fields):
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "head_dim": 48,
    }
    sizes |= {"num_key_value_heads": 3, "tie_word_embeddings": True, "model_type": "qwen3"}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e8}, "max_position_embeddings": 2048}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_drafter(sizes | fields, VOCABULARY, {})


def embedding():
    return torch.randn(VOCABULARY, 96, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def copying():
    return add_copying_heads(drafter(), embedding(), torch.ones(VOCABULARY))


def share_copied(model, distance):
    """Return how many tokens of a phrase are predicted when it comes again, so many tokens later."""
    generator = torch.Generator().manual_seed(3)
    phrase, between = (torch.randint(0, VOCABULARY, (count,), generator=generator) for count in (20, distance - 20))
    ids = torch.cat([phrase, between, phrase])[None]
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits[0].argmax(-1)
    return float((found[-19:-1] == phrase[2:]).float().mean())  # two tokens have to be there before


@pytest.mark.parametrize("distance", [20, 60, 200, 900])
def test_a_repeated_phrase_is_continued(copying, distance):
    assert share_copied(copying, distance) >= 0.8
    assert share_copied(drafter(), distance) <= 0.2


def test_long_rows_do_not_disturb_what_is_copied(copying):
    """Training lengthens the embeddings of frequent tokens, and what is normalised together with them."""
    with torch.no_grad():
        lengths = 1 + 4 * torch.rand(VOCABULARY, 1, generator=torch.Generator().manual_seed(6))
        copying.model.embed_tokens.weight[:, : check_can_copy(copying).embedding] *= lengths
        copying.eval().set_attn_implementation("eager")
        ids = torch.randint(0, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(7))
        weights = copying(input_ids=ids, output_attentions=True).attentions[0][0]
    for head in (0, 1):
        assert weights[head].diagonal(-head - 1).min() > 0.95


def test_two_tokens_are_matched_and_not_one(copying):
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(0, VOCABULARY, (40,), generator=generator)
    # Token 5 occurs after 6 and after 7, and is followed by 8 there, and by 9.
    text[[4, 5, 6]], text[[20, 21, 22]], text[[30, 31]] = (torch.tensor(one) for one in ([6, 5, 8], [7, 5, 9], [6, 5]))
    with torch.no_grad():
        assert copying.eval()(input_ids=text[None, :32]).logits[0, -1].argmax() == 8
        text[30] = 7
        assert copying(input_ids=text[None, :32]).logits[0, -1].argmax() == 9


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tie_word_embeddings": False}, "must have tied embeddings"),
        ({"num_hidden_layers": 1}, "must have two layers or more"),
        ({"num_key_value_heads": 1}, "must have two heads or more, each with keys of its own"),
        ({"head_dim": 8}, "codes have 2 dimensions"),
        ({"model_type": "llama"}, "must normalise queries and keys, as Qwen3 does"),
    ],
)
def test_a_drafter_that_cannot_copy_is_refused(fields, problem):
    with torch.device("meta"), pytest.raises(ValueError, match=problem):
        check_can_copy(drafter(**fields))


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_training_holds_the_computed_weights_and_trains_all_others(copying, optimizer):
    before = {name: weight.detach().clone() for name, weight in copying.named_parameters()}
    held = [(weight, part, weight.detach()[part].clone()) for weight, part in copying_weights(copying)]
    assert len(held) == 13
    made = Optimization(optimizer).configure(copying, 0.1, 10)["optimizer"]
    ids = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        copying(input_ids=ids, labels=ids).loss.backward()
        made.step()
        made.zero_grad()
    for weight, part, values in held:
        assert torch.equal(weight[part], values)
    whole = {id(weight) for weight, part, _ in held if part == (slice(None),)}
    trained = {name: weight for name, weight in copying.named_parameters() if id(weight) not in whole}
    assert len(whole) == 6
    assert not any(torch.equal(before[name], weight) for name, weight in trained.items())


def test_a_drafter_without_such_heads_is_trained_whole():
    model = drafter()
    assert not list(copying_weights(model))
    optimizer = adamw(model, 0.1)
    hold(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_the_heads_are_known_again_after_loading(copying, tmp_path):
    copying.save_pretrained(tmp_path)
    loaded = type(copying).from_pretrained(tmp_path)
    assert len(list(copying_weights(loaded))) == 13
    assert share_copied(loaded, 60) >= 0.8
