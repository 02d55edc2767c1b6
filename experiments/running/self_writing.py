"""Let the target write the instructions and the text of the sources of kind `self`, as a part of `prepare`."""

import logging
import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.artifacts import rows
from drafter.artifacts.manifest import Stage, sha256, write_jsonl
from drafter.data.control_tokens import NEUTRAL
from drafter.data.conversations import Conversation, Message, UnusableConversation
from drafter.data.engines import Engine, Limits, transformers_engine, vllm_engine
from drafter.data.prompts import encode_conversation, encode_prompt, known_ids
from drafter.data.self_written import SCHEMA, Collection, Writer, write_until_enough
from drafter.data.steering import PLACEHOLDER, Recipe
from drafter.data.user_turn import UserTurn
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import context_limit, load_target, load_tokenizer, vocabulary_width
from drafter.models.sharding import check_parallel
from drafter.ranks import Ranks, join, wait_for_all
from experiments.running.data_settings import SELF_WRITTEN
from experiments.running.inputs import claim, plain, target_inputs, target_named, target_source
from experiments.running.progress import Progress
from experiments.running.recipes import INSTRUCTIONS, TEXT, SelfSource, pretraining_settings, self_sources

log = logging.getLogger(__name__)
MARGIN = 1.1  # instructions and tokens beyond those that are needed, since hashes divide them into splits


def write_sources(cfg: DictConfig) -> None:
    """Write the rows of every source of kind `self` that is not complete yet."""
    for source in self_sources(cfg):
        stage = claim_source(cfg, source)
        if stage.complete:
            log.info("%s is up to date", source.directory)
        else:
            write_source(cfg, source, stage)


def claim_source(cfg: DictConfig, source: SelfSource) -> Stage:
    """Claim the directory of a source. Its identity is the target, the settings, the seed and how many are wanted."""
    settings = source_settings(cfg, source)
    return claim(cfg, SELF_WRITTEN, settings, target_inputs(cfg), source.directory, module="prepare")


def source_settings(cfg: DictConfig, source: SelfSource) -> dict[str, Any]:
    """Return the settings that determine what the target writes for a source."""
    settings = {
        **source.identity(),
        "part": source.part,
        "wanted": wanted(cfg, source),
        "max_message_tokens": message_limit(cfg, source),
        "shard_size": cfg.generation.shard_size,
        "engine": cfg.generation.engine,
        "seed": cfg.seed,
        "target_dtype": cfg.target.dtype,
    }
    for name in ("weight", "template"):  # they decide how rows are used, not what the target writes
        settings.pop(name, None)
    return settings


def write_source(cfg: DictConfig, source: SelfSource, stage: Stage) -> None:
    """Write the rows of a source in rounds, then the file of those that are kept, and the manifest."""
    ranks, amount = join(cfg.target.parallel == "tensor"), wanted(cfg, source)
    tokenizer = load_tokenizer(target_source(cfg))
    writer = make_writer(cfg, source, ranks, tokenizer)
    size = cfg.generation.shard_size
    if source.part == INSTRUCTIONS:
        size = min(size, _up(MARGIN * amount))
        collection, first = Collection(amount), _up(MARGIN * amount / size)
    else:
        collection, first = Collection(amount, lambda row: row["tokens"]), 1
    for example in source.settings.read_examples:
        collection.seen.reason_against(example)  # a message that repeats an example is a duplicate
    with Progress(f"{source.part} {source.name}", "row", ranks.world_size) as progress:
        count = write_until_enough(
            writer, stage.folder, collection, first=first, size=size, ranks=ranks, report=progress
        )
    if ranks.first:
        files, _ = rows.finish(stage.folder, count, SCHEMA)
        path = stage.directory / f"{source.part}.jsonl"
        write_jsonl(path, [_row(source, row) for row in collection.kept])
        turn = first_turn(source, tokenizer)
        counts = {
            **collection.counts(),
            "tokens": sum(row["tokens"] for row in collection.kept),
            "begins_with": tokenizer.decode(turn.prefix_ids),
            "stop_ids": writer.stop_ids,
            "target": target_named(cfg),
        }
        stage.finish({**files, path.name: sha256(path)}, counts)
        log.info("%s: %s", source.directory, counts)
    wait_for_all()  # the preparation reads the file


def make_writer(cfg: DictConfig, source: SelfSource, ranks: Ranks, tokenizer: PreTrainedTokenizerBase) -> Writer:
    """Load the target and return the writer of a source."""
    settings, where, turn = source.settings, target_source(cfg), first_turn(source, tokenizer)
    ends = end_of_turn_ids(where, tokenizer)
    stop_ids = list(dict.fromkeys([*([] if turn.end_id is None else [turn.end_id]), *ends]))
    limits = [Limits(settings.top_p, message_limit(cfg, source), stop_ids)]
    limits += [Limits(settings.top_p, settings.max_answer_tokens, stop_ids)] if source.part == TEXT else []
    message, *answers = engines(cfg, limits, ranks)
    known = known_ids(tokenizer, vocabulary_width(where))
    return Writer(recipe_of(cfg, source), tokenizer, message, stop_ids, known, *answers)


def engines(cfg: DictConfig, limits: list[Limits], ranks: Ranks) -> Iterator[Engine]:
    """Yield an engine for each of the limits, all with one copy of the target; vLLM has one alone."""
    how = cfg.generation
    if how.engine == "vllm":
        yield vllm_engine(target_source(cfg), limits[0], cfg.seed, **plain(how.vllm))
        return
    target = load_target(target_source(cfg)).to(ranks.device)
    for limit in limits:
        yield transformers_engine(target, limit, how.batch_tokens)


def recipe_of(cfg: DictConfig, source: SelfSource) -> Recipe:
    """Return how the target writes the messages of a source."""
    settings = source.settings
    return _steering(source)._replace(
        name=f"{source.part} {source.name}",
        seed=cfg.seed,
        temperature=float(settings.temperature),
        with_answers=source.part == TEXT,
    )


def wanted(cfg: DictConfig, source: SelfSource) -> int:
    """Return how many instructions, or how many tokens of text, a source needs.

    Raises:
        ValueError: the config sets no number.
    """
    heldout = cfg.data.heldout_percent / 100
    weights = _weights(cfg, source.part)
    share = weights[source.name] / sum(weights.values())
    if source.part == TEXT:
        limit = cfg.prepare.pretraining_tokens
        if limit is None:
            raise ValueError(
                f"{source.owner}: prepare.pretraining_tokens is null, and the target writes without end: give a number"
            )
        return _up(MARGIN * share * max(limit / (1 - heldout), cfg.prepare.heldout_tokens / heldout))
    if source.settings.number is not None:
        return source.settings.number
    if cfg.prepare.instructions is None:
        raise ValueError(f"{source.owner}.number and prepare.instructions are null: give a number to one of them")
    return _up(MARGIN * share * cfg.prepare.instructions / (1 - heldout))


def _up(number: float) -> int:
    """Return the number rounded up, where 44.00000001 is 44."""
    return math.ceil(round(number, 6))


def _weights(cfg: DictConfig, part: str) -> dict[str, float]:
    data = plain(cfg.data)
    sources = data["instructions"] if part == INSTRUCTIONS else pretraining_settings(data)
    return {name: float(settings.get("weight", 1.0)) for name, settings in sources.items()}


def message_limit(cfg: DictConfig, source: SelfSource) -> int:
    """Return the largest number of tokens of a message."""
    return int(source.settings.max_new_tokens or cfg.prepare.max_prompt_tokens)


def first_turn(source: SelfSource, tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """Return the user's turn of the first message of a source."""
    return _steering(source).turn(tokenizer, 0)


def longest_turn(source: SelfSource, tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """Return the turn that most tokens precede, of all system prompts, examples and requests of a source.

    Raises:
        ValueError: the chat template cannot write one of them, which the error quotes.
    """
    steering, lengths = _steering(source), []
    asked: list[Message] = [] if steering.requests else [{"role": "user", "content": NEUTRAL}]
    for number, before in enumerate(steering.every_before()):
        try:
            lengths.append((len(encode_conversation(tokenizer, Conversation([*before, *asked]))), number))
        except UnusableConversation as problem:
            given = [message["content"] for message in before if message["content"] != PLACEHOLDER]
            raise ValueError(f"{source.owner}: {problem}. The messages before it were {given!r:.200}") from None
    return steering.turn(tokenizer, max(lengths)[1])


def _steering(source: SelfSource) -> Recipe:
    settings = source.settings
    steered = (settings.systems, settings.read_examples, settings.examples_shown, tuple(settings.requests or ()))
    return Recipe("", 0, 1.0, *steered)


def check_sources(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the sources of kind `self` before the target is loaded.

    Raises:
        ValueError: a setting is out of range, the target has no chat template, or a message does not fit.
    """
    sources = self_sources(cfg)
    if not sources:
        return
    check_parallel(cfg.target.parallel, "tensor", "prepare")
    if not 0 < cfg.data.heldout_percent < 100:
        raise ValueError(f"data.heldout_percent is {cfg.data.heldout_percent}, must be above 0 and below 100")
    if cfg.generation.engine not in ("transformers", "vllm"):
        raise ValueError(f"generation.engine is '{cfg.generation.engine}', must be transformers or vllm")
    texts = [source.owner for source in sources if source.part == TEXT]
    if texts and cfg.generation.engine == "vllm":
        raise ValueError(
            f"generation.engine=vllm writes instructions alone, and {texts[0]} is of kind self: use "
            f"generation.engine=transformers, or text from files or docstrings"
        )
    context = context_limit(target_source(cfg))
    for source in sources:
        wanted(cfg, source)
        first_turn(source, tokenizer)
        prefix, limit = len(longest_turn(source, tokenizer).prefix_ids), message_limit(cfg, source)
        if prefix + limit > context:
            raise ValueError(
                f"{source.owner}: up to {prefix} tokens precede a message, and it may have {limit}: together they "
                f"exceed the target's context of {context}. Lower {source.owner}.max_new_tokens, or give fewer or "
                f"shorter examples and system prompts"
            )
        answer, around = source.settings.max_answer_tokens, len(encode_prompt(tokenizer, NEUTRAL))
        if source.part == TEXT and around + limit + answer > context:
            raise ValueError(
                f"{source.owner}: a message of {limit} tokens and an answer of {answer} may exceed the target's "
                f"context of {context}: lower {source.owner}.max_new_tokens or {source.owner}.max_answer_tokens"
            )


def describe(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Say what the target would write. Nothing is generated."""
    for source in self_sources(cfg):
        turn = first_turn(source, tokenizer)
        what = "instructions" if source.part == INSTRUCTIONS else "tokens of questions and answers"
        yield (
            f"{source.part} {source.name}: the target writes {wanted(cfg, source):,} {what} itself, into "
            f"{source.directory}, after {tokenizer.decode(turn.prefix_ids)[-60:]!r} ({len(turn.prefix_ids)} tokens)"
        )


def _row(source: SelfSource, row: dict[str, Any]) -> dict[str, Any]:
    text = {"prompt": row["text"]} if source.part == INSTRUCTIONS else {"text": f"{row['text']}\n\n{row['answer']}"}
    return {"id": row["id"], **text}
