import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.families import family
from drafter.models.initialization import build_drafter
from drafter.models.inspection import num_active_parameters
from drafter.models.loading import meta_model
from experiments.planning.expected_calls import call_seconds
from experiments.planning.roofline import (
    Hardware,
    Shape,
    forward_seconds,
    generation_memory,
    operations,
    training_memory,
    training_seconds,
)
from tests.conftest import small_model

FAST = Hardware(
    "fast", "cuda", flops=1e12, bandwidth=1e9, memory=1e9, efficiency=1.0, seconds_per_layer=0, process_memory=0
)


def meta(name):
    with open(f"conf/target/{name}.yaml") as file:
        fields = yaml.safe_load(file)
    shape = fields["target_shape"]
    assert shape.pop("of") == fields["target"]["path"]
    return Shape.of(meta_model("no/hub", shape=shape))


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        # Of the models' cards and papers: the exact counts of their checkpoints.
        ("llama2_7b_chat", 6_738_415_616),
        ("llama2_13b_chat", 13_015_864_320),
        ("llama3_8b_instruct", 8_030_261_248),
        ("qwen3_8b", 8_190_735_360),
    ],
)
def test_the_targets_shapes_have_the_parameters_of_their_checkpoints(target, parameters):
    assert meta(target).parameters == parameters


@pytest.mark.parametrize(
    ("drafter", "vocabulary", "millions"),
    [("llama2_115m", 32_000, 117), ("llama3_140m", 128_256, 141), ("qwen3_160m", 151_936, 159)],
)
def test_the_drafters_have_the_size_that_they_are_called_by(drafter, vocabulary, millions):
    with open(f"conf/drafter/{drafter}.yaml") as file, torch.device("meta"):
        shape = Shape.of(build_drafter(yaml.safe_load(file), vocabulary, {}))
    assert round(shape.parameters / 1e6) == millions


def test_a_cache_of_keys_and_values_is_as_wide_as_the_models_groups():
    assert meta("llama2_7b_chat").kv_width == 2 * 32 * 4096
    assert meta("llama3_8b_instruct").kv_width == 2 * 32 * 1024


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied):
    model = small_model(hidden=64, layers=3)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    ids = torch.zeros(2, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(input_ids=ids)
    # Torch's attention attends to all 24 places; with a mask half of them count. Norms' vectors are no products.
    assert operations(Shape.of(model), 48, 24) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_only_scored_positions_meet_the_output_embedding():
    shape = Shape.of(small_model(hidden=32, layers=1))
    assert operations(shape, 10, 0) - operations(shape, 10, 0, scored=4) == 2 * shape.head * 6


def test_a_single_token_takes_the_reading_of_the_weights_and_many_take_their_arithmetic():
    shape = Shape.of(small_model(hidden=64, layers=3))
    assert forward_seconds(FAST, shape, 1, 0, 1, width=4) == pytest.approx(shape.parameters * 4 / 1e9)
    many = forward_seconds(FAST, shape, 10**6, 0, 1, width=4)
    assert many == pytest.approx(operations(shape, 10**6, 0) / 1e12)
    assert forward_seconds(FAST, shape, 1, 0, 1, width=4, split=2) == pytest.approx(shape.parameters * 2 / 1e9)


def test_checkpointing_takes_a_fourth_pass_and_less_memory():
    shape = Shape.of(small_model(hidden=64, layers=3))
    plain, again = (training_seconds(FAST, shape, 10**6, 0, 0, checkpointing) for checkpointing in (False, True))
    assert again - plain == pytest.approx(operations(shape, 10**6, 0, 0) / 1e12)
    kept, less = (training_memory(shape, 1000, 4, 0, 1, checkpointing) for checkpointing in (False, True))
    assert less["activations"] < kept["activations"] / 2
    assert {name: value for name, value in less.items() if name != "activations"} == {
        name: value for name, value in kept.items() if name != "activations"
    }


def test_activations_are_about_what_autograd_keeps():
    model = small_model(hidden=64, layers=4).requires_grad_(True).train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=torch.zeros(4, 24, dtype=torch.long), use_cache=False).last_hidden_state
    found = sum(size for place, size in kept.items() if place not in weights)
    planned = training_memory(Shape.of(model), 96, 4, 0, 1, False)["activations"]
    assert hidden.requires_grad
    assert 0.5 < planned / found < 2


def test_memory_of_training_and_decoding_is_shared_over_devices():
    shape = Shape.of(small_model(hidden=64, layers=3))
    whole, quarter = (training_memory(shape, 100, 4, 0, shards, False) for shards in (1, 4))
    for part in ("weights", "gradients", "optimizer"):
        assert quarter[part] == whole[part] / 4
    assert whole["weights"] == 4 * shape.parameters
    decoding = generation_memory(shape, 8, 100, 2, 2)
    assert decoding["key-value cache"] == 8 * 100 * shape.kv_width


def test_a_call_of_a_mixture_reads_the_experts_that_its_tokens_meet():
    shape = Shape.of(family("mixtral"))
    dense = shape.parameters - shape.routed
    assert shape.met == 0.5  # two of four experts
    assert shape.active == dense + shape.routed // 2 == num_active_parameters(family("mixtral"))
    assert [shape.read(count) for count in (1, 2)] == [dense + 0.5 * shape.routed, dense + 0.75 * shape.routed]
    assert shape.read(100) == pytest.approx(shape.parameters)
    few, many = (forward_seconds(FAST._replace(flops=1e18), shape, count, 0, 1, 4) for count in (1, 4))
    assert many > 1.2 * few  # v grows with gamma
    whole = Shape.of(family("llama"))
    assert whole.active == whole.read(1) == whole.read(100) == whole.parameters


def test_calls_that_memory_bounds_take_the_time_of_weights_and_cache():
    fields = FAST._replace(flops=0, bandwidth=1e3)._asdict()
    fields |= {"flops": 0, "float32_flops": 1e30}  # a call in float32 has the other field
    model = small_model(0, hidden=32, layers=2, vocab=24)
    shape = Shape.of(model)
    for context in (0, 1000):
        numbers = shape.parameters + context * shape.kv_width
        assert call_seconds(fields, model, 1, context) == pytest.approx(4 * numbers / 1e3)
        assert call_seconds(fields, model, 5, context) == call_seconds(fields, model, 1, context)
