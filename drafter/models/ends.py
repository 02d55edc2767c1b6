"""Where the assistant's turn ends: the ids after which a response is complete.

Three places name them: the generation config (else the model's config), the tokenizer, and the chat template, which
writes one after each turn. They differ in many published models: a fine-tune often keeps its base model's end of text
in one of them. A response ends at any of these ids, in every command alike.
"""

import logging

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from drafter.models.loading import Model, ModelSource, load_config, load_generation_config, vocabulary_width

log = logging.getLogger(__name__)
CONTENT = "QXZ content QXZ"  # of a turn; no template has it of its own


def end_of_turn_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response, the one that the chat template or the tokenizer writes first.

    An id beyond the model's embedding ends nothing, since no model can produce it. A model that names none gets a
    warning, and its responses run to their limit.
    """
    named, rows = [template_end(tokenizer), tokenizer.eos_token_id, *config_ends(model)], vocabulary_width(model)
    ends = list(dict.fromkeys(token for token in named if token is not None and token < rows))
    if not ends:
        log.warning(
            "nothing ends a response of %s: its generation config, config, tokenizer and chat template name no end of "
            "text. Every response runs to max_new_tokens",
            ModelSource.of(model).path,
        )
    return ends


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token that the chat template writes right after the assistant's words.

    None where there is no template, where it writes no control token there, and where it does not take a user's turn
    and an answer.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except (TemplateError, ValueError):
        return None
    _, found, after = str(text).rpartition(CONTENT)
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    control = {**tokenizer.get_added_vocab(), **special}
    matches = [piece for piece in control if piece and after.lstrip().startswith(piece)]
    return control[max(matches, key=len)] if found and matches else None


def config_ends(model: Model) -> list[int]:
    """The ids of the generation config, or of the model's config where that names none."""
    generation = load_generation_config(model)
    found = generation.eos_token_id if generation else None
    if found is None:
        config = load_config(model)
        known = (getattr(one, "eos_token_id", None) for one in (config, config.get_text_config()))
        found = next((ids for ids in known if ids is not None), None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)
