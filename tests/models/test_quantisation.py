"""A target whose quantised weights cannot be loaded is refused with one sentence that names the package."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from drafter.models.inspection import num_active_parameters, num_parameters
from drafter.models.loading import check_quantisation, load_model
from tests.families import family

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("gptq", {"bits": 4}),
        ("awq", {"bits": 4}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("compressed-tensors", {}),
        ("nothing", {}),
    ],
)
def test_quantised_weights_without_their_package_are_refused_by_name(tmp_path, method, fields):
    config = LlamaConfig(**SIZES)
    config.save_pretrained(tmp_path / "plain")
    check_quantisation(tmp_path / "plain")
    config.quantization_config = {"quant_method": method, **fields}
    config.save_pretrained(tmp_path / "quantised")
    for refuse in (check_quantisation, load_model):
        with pytest.raises(
            ValueError, match=rf"quantised' has weights that are quantised by {method}, which cannot be .*: \w+"
        ):
            refuse(tmp_path / "quantised")


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_parameters_of_packed_weights_are_those_of_the_model(kind):
    model = family(kind)
    expected = num_parameters(model), num_active_parameters(model)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed = torch.zeros(module.weight.numel() // 8, dtype=torch.int32)
            module.weight = nn.Parameter(packed, requires_grad=False)
    assert sum(parameter.numel() for parameter in model.parameters()) < expected[0]
    assert (num_parameters(model), num_active_parameters(model)) == expected
