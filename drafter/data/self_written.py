"""Let the target write instructions itself, shard by shard, and keep those that can be used.

A shard's random numbers depend only on the seed, the source and the shard's number, and which messages are kept depends
only on the shards in the order of their numbers. An interrupted run therefore continues with the missing shards, and
any number of ranks writes the same files. Whether another round of shards is needed is decided after each round.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from drafter.artifacts import rows
from drafter.artifacts.storage import Folder
from drafter.data.control_tokens import ControlTokenError, control_ids, control_pattern
from drafter.data.engines import Engine, Failure, Request, hashed_seed
from drafter.data.near_duplicates import SeenTexts
from drafter.data.prompts import encode_prompt
from drafter.data.steering import Recipe
from drafter.data.user_turn import UserTurn
from drafter.progress import Report, silent
from drafter.ranks import Ranks, from_first, wait_for_all
from drafter.ranks import deal as deal_shards

log = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        *rows.REQUIRED,
        ("text", pa.string()),
        ("answer", pa.string()),
        ("tokens", pa.int32()),
        ("left_out", pa.string()),
    ]
)
LEAST = 0.02  # the share of a round that must be usable, or writing stops
MARGIN, GROWTH = 1.1, 16  # of a round: what is expected to be needed, and at most so many times what there is
SENTENCE = re.compile(r".*[.!?][\"'”’)]*(?=\s|$)", re.DOTALL)
REPEATED = re.compile(r"(.{1,24}?)\1{4,}", re.DOTALL)


class Writer:
    """Write the messages of a shard.

    Args:
        recipe: how the target writes.
        tokenizer: the target's.
        engine: generates messages; it ends them at `stop_ids`.
        stop_ids: the control tokens that end a message.
        known_ids: the ids that both the tokenizer and the target have.
        answer: generates answers, if the recipe wants them.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        stop_ids: list[int],
        known_ids: set[int],
        answer: Engine | None = None,
    ):
        self.recipe, self.tokenizer, self.engine, self.answer = recipe, tokenizer, engine, answer
        self.stop_ids, self.known_ids = stop_ids, known_ids
        self.controls, self.pattern = control_ids(tokenizer), control_pattern(tokenizer)
        self._turns: dict[int, UserTurn] = {}

    def write(self, shard: int, size: int) -> list[rows.Row]:
        """Return the rows of a shard, those that cannot be used included, with the reason in `left_out`."""
        recipe = self.recipe
        turns = [self._turn(shard * size + index) for index in range(size)]
        requests = [
            Request(f"{recipe.name}:{shard:05d}-{index:04d}", recipe.name, "train", recipe.temperature, turn.prefix_ids)
            for index, turn in enumerate(turns)
        ]
        torch.manual_seed(seed_of(recipe, shard))
        order = sorted(range(size), key=lambda index: requests[index].prompt_ids)  # equal prompts are read once
        responses = dict(zip(order, self.engine([requests[index] for index in order]), strict=True))
        written = []
        for index, (request, turn) in enumerate(zip(requests, turns, strict=True)):
            response = responses[index]
            tokens = [] if isinstance(response, Failure) else response
            text, left_out = self.read(tokens, turn.end_text)
            fields = {"text": text, "left_out": left_out, "answer": "", "tokens": len(tokens)}
            written.append({**request._asdict(), "response_ids": tokens, **fields})
        if self.answer:
            self._add_answers([row for row in written if not row["left_out"]], self.answer)
        return written

    def read(self, tokens: list[int], end_text: str = "") -> tuple[str, str]:
        """Return the message of generated tokens, and the reason why it cannot be used, or ""."""
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        body = tokens[:-1] if ended else tokens
        if not self.known_ids.issuperset(body):
            return "", "with an id that the tokenizer or the target does not have"
        text = str(self.tokenizer.decode(body, clean_up_tokenization_spaces=False))
        if end_text and end_text in text:
            text, ended, body = text.partition(end_text)[0], True, []
        text = text.strip()
        if not ended and self.recipe.requests and (complete := SENTENCE.match(text)):
            text, ended = complete.group(), True
        if not ended:
            return text, "too long"
        if self.controls.intersection(body) or self.pattern.search(text):
            return text, "with control tokens"
        if not text:
            return text, "empty"
        return text, "degenerate" if is_degenerate(text) else ""

    def _turn(self, number: int) -> UserTurn:
        number %= self.recipe.period
        if number not in self._turns:
            self._turns[number] = self.recipe.turn(self.tokenizer, number)
        return self._turns[number]

    def _add_answers(self, written: list[rows.Row], answer: Engine) -> None:
        """Let the target answer the messages, as a user's messages are answered."""
        requests, asked = [], []
        for row in written:
            try:
                ids = encode_prompt(self.tokenizer, row["text"])
            except ControlTokenError:
                row["left_out"] = "with control tokens"
                continue
            requests.append(Request(row["id"], row["kind"], row["split"], self.recipe.temperature, ids))
            asked.append(row)
        for row, response in zip(asked, answer(requests) if requests else [], strict=True):
            tokens = [] if isinstance(response, Failure) else response
            ended = tokens and tokens[-1] in self.stop_ids
            text, left_out = self.read(tokens if ended else [*tokens, *self.stop_ids[:1]])
            row["answer"], row["tokens"] = text, row["tokens"] + len(tokens)
            row["left_out"] = f"answer {left_out}" if left_out else ""


def seed_of(recipe: Recipe, shard: int) -> int:
    """Return the seed of a shard, which differs between sources and from the seeds of responses."""
    return hashed_seed("self-written", recipe.name, recipe.seed, shard)


def is_degenerate(text: str) -> bool:
    """Return whether a text has no letter, has bytes that are no characters, or mostly repeats one piece.

    >>> [is_degenerate(text) for text in ("What is it?", "1 + 1", "a cat a cat a cat a cat a cat sat", "so \ufffd")]
    [False, True, True, True]
    """
    if "\ufffd" in text or not any(letter.isalpha() for letter in text):
        return True
    if sum(len(found.group()) for found in REPEATED.finditer(text)) > len(text) / 2:
        return True
    words = text.lower().split()
    for n in range(1, 5):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if grams and (most := grams.most_common(1)[0][1]) >= 4 and most * n > len(words) / 2:
            return True
    return False


class Collection:
    """The messages that are kept, in the order of the shards, and why the others are left out.

    Args:
        wanted: how many are wanted.
        amount: what a row counts: 1, or its tokens.
    """

    def __init__(self, wanted: int, amount: Callable[[rows.Row], int] = lambda row: 1):
        self.wanted, self.amount = wanted, amount
        self.seen, self.kept, self.left_out = SeenTexts(), list[rows.Row](), Counter[str]()
        self.generated = self.amount_kept = 0
        self._before = (0, 0)  # generated and kept before the last round

    def add(self, written: list[rows.Row]) -> None:
        """Add the rows of a shard."""
        for row in written:
            self.generated += 1
            reason = row["left_out"] or ("not needed" if self.amount_kept >= self.wanted else None)
            if reason := reason or self.seen.reason_against(row["text"]):
                self.left_out[reason] += 1
            else:
                self.kept.append(row)
                self.amount_kept += self.amount(row)

    def shards_after(self, count: int, size: int) -> int:
        """Return how many shards there shall be after the next round; `count` if there are enough.

        Raises:
            ValueError: less than 2% of the last round can be used, and less than half of what is wanted is there.
        """
        generated, kept = self.generated - self._before[0], len(self.kept) - self._before[1]
        self._before = (self.generated, len(self.kept))
        if self.amount_kept >= self.wanted:
            return count
        if kept < LEAST * generated:
            reasons = ", ".join(f"{number} {reason}" for reason, number in self.left_out.most_common())
            message = (
                f"only {kept} of the last {generated} messages that the target wrote can be used, and "
                f"{self.amount_kept} of {self.wanted} are there (left out so far: {reasons})"
            )
            if 2 * self.amount_kept < self.wanted:
                raise ValueError(f"{message}: raise the temperature, steer by `system` or `examples`, or ask for fewer")
            log.warning("%s: going on with these", message)
            return count
        each = self.amount_kept / len(self.kept) * kept / generated * size  # what a shard of the last round gave
        more = -(-MARGIN * (self.wanted - self.amount_kept) // each)
        return count + int(max(1, min(more, GROWTH * count)))

    def counts(self) -> dict[str, Any]:
        """Return the counts for a manifest: "generated" is the sum of "written" and "left_out"."""
        return {"generated": self.generated, "written": len(self.kept), "left_out": dict(self.left_out)}


def write_until_enough(
    writer: Writer,
    folder: Folder,
    collection: Collection,
    *,
    first: int,
    size: int,
    ranks: Ranks,
    report: Report = silent,
) -> int:
    """Write shards in rounds until the collection has enough.

    Args:
        writer: writes a shard.
        folder: where shards are written. Those that are complete are kept.
        collection: is filled on the first rank.
        first: the number of shards of the first round.
        size: the rows per shard.
        ranks: the ranks that share the shards.
        report: is told how many rows are written and how many there will be after this round.

    Returns:
        The number of shards.

    Raises:
        ValueError: hardly any message can be used.
    """
    done, count = 0, first
    while done < count:
        missing = rows.missing_shards(folder, count)
        for index, number in deal_shards(missing, ranks.world_size):
            written = writer.write(number, size)
            if ranks.writes:
                rows.write_shard(folder, number, written, SCHEMA, {})
            there = count - len(missing) + index + 1
            report(there * size, count * size, sum(row["tokens"] for row in written))
        wait_for_all()
        decision: int | ValueError = count
        if ranks.first:
            for number in range(done, count):
                collection.add(rows.read_shard(folder, number))
            try:
                decision = collection.shards_after(count, size)
            except ValueError as problem:
                decision = problem
        done, decision = count, from_first(decision)
        if isinstance(decision, ValueError):
            raise ValueError(f"{writer.recipe.name}: {decision}")
        count = decision
    return count
