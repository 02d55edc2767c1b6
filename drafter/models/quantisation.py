"""Refuse quantised weights that cannot be loaded here, before anything is computed."""

from transformers.quantizers import AutoHfQuantizer

from drafter.models.loading import load_config
from drafter.models.source import Model, ModelSource


def check_quantisation(model: Model) -> None:
    """Check that transformers can load the weights of a model, if they are quantised.

    Raises:
        ValueError: it cannot, for example because a package is missing; names the method and what transformers says.
    """
    fields = getattr(load_config(model), "quantization_config", None)
    if not fields:
        return
    known = fields if isinstance(fields, dict) else fields.to_dict()
    try:
        AutoHfQuantizer.from_config(fields, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, ValueError, RuntimeError) as problem:
        reason = " ".join(str(problem).split()).rstrip(".")
        raise ValueError(
            f"'{ModelSource.from_model(model).path}' has weights that are quantised by {known.get('quant_method')}, "
            f"which cannot be loaded here: {reason}. Or give the checkpoint that is not quantised"
        ) from problem
