"""A target whose quantised weights cannot be loaded is refused with one sentence that names the package."""

import pytest
from transformers import LlamaConfig

from drafter.models.quantisation import check_quantisation, is_quantised

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
    assert not is_quantised(tmp_path / "plain")
    config.quantization_config = {"quant_method": method, **fields}
    config.save_pretrained(tmp_path / "quantised")
    assert is_quantised(tmp_path / "quantised")
    with pytest.raises(
        ValueError, match=rf"quantised' has weights that are quantised by {method}, which cannot be .*: \w+"
    ):
        check_quantisation(tmp_path / "quantised")
