"""Build a drafter with random weights for a target's vocabulary."""

import logging
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def build_drafter(config: dict[str, Any], vocab_size: int, special_ids: dict[str, int | None]) -> PreTrainedModel:
    """Build a drafter with random weights and the target's vocabulary.

    Args:
        config: fields of the architecture's Hugging Face config; `model_type` chooses the architecture.
        vocab_size: rows of the embedding, as many as the target has, padding included.
        special_ids: the bos, eos and pad token ids of the target's tokenizer.
    """
    fields = dict(config)
    model_type = fields.pop("model_type")
    drafter_config = AutoConfig.for_model(model_type, **fields, vocab_size=vocab_size, **special_ids)
    return AutoModelForCausalLM.from_config(drafter_config)


def special_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int | None]:
    """Return the config fields of a tokenizer's special tokens, with None for one without a row in the embedding.

    An example is a padding token that was added to the tokenizer but not to the model. A model never sees its id.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, token in ids.items():
        if token is not None and token >= vocab_size:
            log.info("%s is %d, beyond the embedding's %d rows: it is left out of the config", name, token, vocab_size)
            ids[name] = None
    return ids
