"""The token ids that end the assistant's turn, after which a response is complete.

They come from three sources: the generation config (or the model's config), the tokenizer, and the chat template, which
puts one after each turn. In many published models the three differ, since a fine-tuned model often keeps the end of
text of its base model in one of them. In every command, a response ends at any of these ids.
"""

import logging

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from drafter.models.loading import load_config, load_generation_config, vocabulary_width
from drafter.models.source import Model, ModelSource

log = logging.getLogger(__name__)
CONTENT = "QXZ content QXZ"  # the content of a turn, which no template contains itself


def end_of_turn_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a response: the chat template's first, then the tokenizer's, then the configs'.

    Ids beyond the model's embedding are left out, since the model cannot produce them. If no id is left, a warning is
    logged, and responses run to their maximum length.
    """
    candidates, rows = [template_end(tokenizer), tokenizer.eos_token_id, *config_ends(model)], vocabulary_width(model)
    ends = list(dict.fromkeys(token for token in candidates if token is not None and token < rows))
    if not ends:
        log.warning(
            "nothing ends a response of %s: its generation config, config, tokenizer and chat template have no "
            "end-of-text token. Every response will run to max_new_tokens",
            ModelSource.from_model(model).path,
        )
    return ends


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the control token that the chat template puts directly after the assistant's content.

    Return None if there is no template, if it puts no control token there, or if it does not accept a user's turn
    followed by an assistant's.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except (TemplateError, ValueError):
        return None
    _, found, after = str(text).rpartition(CONTENT)
    return leading_control(tokenizer, after) if found else None


def leading_control(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of the control token with which a text begins after white space, or None."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    control = {**tokenizer.get_added_vocab(), **special}
    matches = [piece for piece in control if piece and text.lstrip().startswith(piece)]
    return control[max(matches, key=len)] if matches else None


def config_ends(model: Model) -> list[int]:
    """Return the end-of-text ids of the generation config, or of the model's config if that has none."""
    generation = load_generation_config(model)
    ends = generation.eos_token_id if generation else None
    if ends is None:
        config = load_config(model)
        candidates = (getattr(one, "eos_token_id", None) for one in (config, config.get_text_config()))
        ends = next((ids for ids in candidates if ids is not None), None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
