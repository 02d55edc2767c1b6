"""Choose the instructions and prompts to prepare, and refuse data that would make a later stage fail."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.data.control_tokens import NEUTRAL, ControlTokenError, control_pattern
from drafter.data.conversations import UnusableConversation, is_logged, opening, read_conversation
from drafter.data.prompts import encode_conversation, encode_text
from drafter.data.selection import Candidate, Row, Selection, Tally, check_ids

log = logging.getLogger(__name__)


def encodes_text(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    """Return a function that tells whether the tokenizer can encode a text, including control tokens in it."""
    pattern = control_pattern(tokenizer)

    def encodes(text: str) -> bool:
        if not pattern.search(text):
            return True
        try:
            return bool(encode_text(tokenizer, [text]))
        except ControlTokenError:
            return False

    return encodes


def prompt_length(tokenizer: PreTrainedTokenizerBase) -> Callable[[Row], int | str]:
    """Return a function from a row to the number of tokens of its first prompt, or the reason why it has none.

    A conversation is encoded as a whole as well, because the template may refuse a later turn. A neutral text
    stands for answers that are not logged.
    """
    encodes = encodes_text(tokenizer)

    def length(row: Row) -> int | str:
        try:
            if not encodes(row.get("reference", "")):
                return ControlTokenError.reason
            conversation = read_conversation(row)
            messages = [one if is_logged(one) else {**one, "content": NEUTRAL} for one in conversation.messages]
            prompts = [messages[:point] for point in conversation.answer_points()]
            lengths = [len(encode_conversation(tokenizer, conversation._replace(messages=one))) for one in prompts]
            return lengths[0] if lengths else "no message to answer"
        except UnusableConversation as problem:
            return problem.reason

    return length


def choose_instructions(
    cfg: DictConfig,
    streams: Mapping[str, Iterator[Candidate]],
    weights: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
) -> Selection:
    """Return the training instructions, and a tenth of their number for validation.

    If the hash puts no row into validation, as happens with few rows, some training rows are held out instead.

    Raises:
        ValueError: a source gives no instruction, or all sources together give too few.
    """
    wanted, limit = cfg.prepare.instructions, cfg.prepare.max_prompt_tokens
    quotas = {"train": wanted, "validation": wanted and max(1, wanted // 10)}
    selection = Selection(streams, quotas, limit, prompt_length(tokenizer), weights)
    is_full = wanted is not None and len(selection.rows["train"]) == wanted
    for name, tally in selection.tallies.items():
        if not tally.used and not tally.left_out["not needed"] and (tally.read or not is_full):
            raise ValueError(_no_usable_row(f"the source of instructions '{name}'", tally, limit))
    train, validation = selection.rows["train"], selection.rows["validation"]
    if len(train) + len(validation) < 2 or not train:
        raise ValueError(
            f"data '{cfg.data.name}' gave {len(train)} instructions for training and {len(validation)} for validation: "
            f"at least one of each is needed (prepare.instructions is {wanted})"
        )
    if not validation:
        _hold_out(selection, len(train) * cfg.data.heldout_percent / 100)
    check_ids([*selection.rows["train"], *selection.rows["validation"]], f"data '{cfg.data.name}'")
    return selection


def _hold_out(selection: Selection, number: float) -> None:
    """Move about `number` rows, at least one and at most half, to validation, in the order of their prompts' hashes."""
    train = selection.rows["train"]
    by_hash = sorted(train, key=lambda row: hashlib.sha256(f"validation:{opening(row)}".encode()).digest())
    held = {row["id"]: row["kind"] for row in by_hash[: max(1, min(round(number), len(train) // 2))]}
    selection.rows["train"] = [row for row in train if row["id"] not in held]
    selection.rows["validation"] = [row for row in train if row["id"] in held]
    for kind in held.values():
        tally = selection.tallies.get(kind) or next(iter(selection.tallies.values()))
        tally.used.subtract(["train"])
        tally.used["validation"] += 1
    log.warning("no instruction fell into validation by its hash, so %d of %d are held out", len(held), len(train))


def choose_prompts(
    cfg: DictConfig, streams: Mapping[str, Iterator[Candidate]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Selection]:
    """Return the prompts of each task.

    Raises:
        ValueError: a task has no usable prompt; names it and says what became of its rows.
    """
    if not streams:
        raise ValueError("there is no task to evaluate on: task is empty")
    length, limit = prompt_length(tokenizer), cfg.prepare.max_prompt_tokens
    selections = {
        task: Selection({task: stream}, {task: cfg.prepare.prompts_per_task}, limit, length)
        for task, stream in streams.items()
    }
    for task, selection in selections.items():
        if not selection.rows[task]:
            raise ValueError(_no_usable_row(f"task '{task}'", selection.tallies[task], limit))
        check_ids(selection.rows[task], f"task '{task}'")
    return selections


def _no_usable_row(owner: str, tally: Tally, limit: int) -> str:
    """Return the error message for a source without a usable row."""
    message = f"{owner} has no row that its settings choose: {tally}"
    if tally.shortest is None:
        return message
    return (
        f"{message}. Its shortest prompt that is too long has {tally.shortest} tokens, "
        f"and prepare.max_prompt_tokens is {limit}: raise it, give shorter rows, or leave it out"
    )
