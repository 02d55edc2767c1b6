"""What the trials of a model have in common: its tokens, and how far its logits are from what they should be.

Shapes: T positions, V vocabulary.
"""

from itertools import cycle, islice

import torch
from transformers import PreTrainedModel

from drafter.models.inspection import vocabulary_rows

# The exceptions of a call that a model or its cache does not support.
UNSUPPORTED = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


def ordinary_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Return the first ids of the vocabulary, without the special tokens that the config names; repeated if too few."""
    config, rows = model.config.get_text_config(), vocabulary_rows(model)
    named = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    special = {token for one in named for token in (one if isinstance(one, list) else [one])}
    first = range(min(rows, count + len(special)))
    return list(islice(cycle([token for token in first if token not in special] or list(first)), count))


def relative_error(
    found_TV: torch.Tensor, expected_TV: torch.Tensor, changed_TV: torch.Tensor, dtype: torch.dtype
) -> float:
    """Return how far logits are from the expected ones, in units of the tolerance: wrong ones are above 1.

    The tolerance is relative to the change that other tokens at the beginning make (`changed_TV`): a state that a draft
    has changed is wrong by about as much, whereas rounding (and an expert that it flips) changes few positions, or all
    by little. Logits that are not a number are reported elsewhere.
    """
    if expected_TV.isnan().any():
        return 0.0
    error, control = (_distance(values_TV.float(), expected_TV.float()) for values_TV in (found_TV, changed_TV))
    precision = torch.finfo(dtype).eps
    rounding = max(1e-5, 2 * precision) * _distance(expected_TV.float(), torch.zeros_like(expected_TV.float()))
    return error / max((0.1 if precision > 1e-4 else 0.01) * control, rounding, 1e-30)


def _distance(values_TV: torch.Tensor, reference_TV: torch.Tensor) -> float:
    """Return the median over positions of the Euclidean distance, where equal infinite logits count as no distance."""
    difference_TV = (values_TV - reference_TV).masked_fill(reference_TV.isinf() & (values_TV == reference_TV), 0)
    return float(difference_TV.norm(dim=-1).median())
