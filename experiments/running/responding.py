"""Generate the responses of a distillation set from the config of a stage; see conf/respond.yaml."""

import logging
import os
from collections import Counter
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.artifacts import rows
from drafter.data.conversations import UnusableConversation, read_conversation
from drafter.data.dialogues import Continuation, begin, choose_points, log_engine
from drafter.data.engines import (
    Engine,
    Limits,
    Request,
    ignored_settings,
    mixed_engine,
    references_engine,
    transformers_engine,
    vllm_engine,
)
from drafter.data.http_client import HttpClient, Retries
from drafter.data.prompts import encode_prompt, encode_text, known_ids, thinking_ids
from drafter.data.responses import Instruction, plan, schema, shards, write_responses
from drafter.data.selection import read_instructions
from drafter.data.served import served_engine
from drafter.data.states import StatesEngine, states_engine
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import context_limit, load_target, load_tokenizer, vocabulary_width
from drafter.models.source import Model, ModelSource
from drafter.ranks import Ranks, join, wait_for_all
from experiments.running import replaying
from experiments.running.inputs import (
    claim,
    data_fingerprint,
    frozen_drafter,
    plain,
    target_inputs,
    target_named,
    target_source,
)
from experiments.running.progress import Progress
from experiments.running.response_settings import check, settings_of

log = logging.getLogger(__name__)
CUT_SHARE = 0.1  # of the answers; more cut ones give a warning


def respond(cfg: DictConfig) -> None:
    """Encode the instructions, check them all, then generate shard by shard."""
    check(cfg)
    if cfg.respond.by == "replay":
        return replaying.write(cfg)
    inputs = {"data": data_fingerprint(cfg), **target_inputs(cfg)}
    if cfg.respond.by in ("drafter", "mixture"):
        inputs["drafter"] = model_fingerprint(cfg.inputs.drafter)
    stage = claim(cfg, "respond", settings_of(cfg), inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    ranks, settings = join(cfg.target.parallel == "tensor"), cfg.respond
    tokenizer = load_tokenizer(target_source(cfg))
    requests, skipped = plan_requests(cfg, tokenizer)
    parts, columns = shards(requests, settings.shard_size), schema(settings.top_p, settings.states)
    limits = Limits(settings.top_p, settings.max_new_tokens, end_of_turn_ids(target_source(cfg), tokenizer))
    longest_prompt = context_limit(target_source(cfg)) - limits.max_new_tokens
    following = Continuation(tokenizer, limits.stop_ids, longest_prompt, settings.by == "log", thinking_ids(tokenizer))
    with Progress("respond", "row", ranks.world_size) as progress:
        write_responses(
            engine_with_states(cfg, limits, ranks, requests)
            if settings.states
            else engine(cfg, limits, ranks, tokenizer),
            parts,
            stage.folder,
            columns,
            following=following,
            known_ids=known_ids(tokenizer, vocabulary_width(target_source(cfg))),
            seed=cfg.seed,
            world_size=ranks.world_size,
            writes=ranks.writes,
            report=progress,
        )
    wait_for_all()
    if ranks.first:
        files, notes = rows.finish(stage.folder, len(parts), columns)
        failed = sum((Counter(note["failed"]) for note in notes), Counter[str]())
        counts = {
            "asked": len(requests) + skipped.total(),
            "written": len(requests) - failed.total(),
            "skipped": skipped,
            "failed": failed,
            "answers": sum(note["answers"] for note in notes),
            "turns_left_out": sum((Counter(note["turns_left_out"]) for note in notes), Counter[str]()),
            "truncated": sum(note["truncated"] for note in notes),
            "cut_in_thinking": sum(note.get("cut_in_thinking", 0) for note in notes),
            "stop_ids": limits.stop_ids,
            "target": target_named(cfg),
        }
        if settings.states:
            counts["with_states"] = sum(note["with_states"] for note in notes)
        stage.finish(files, counts)
        log.info("%s: %s", cfg.out, counts)
        warn_of_cut_answers(counts, limits.max_new_tokens)
    wait_for_all()  # the next stage of this process may read the responses


def warn_of_cut_answers(counts: dict[str, Any], limit: int) -> None:
    """Warn if more than a tenth of the answers were cut off at the limit, since training then sees few ends."""
    cut, answers, in_thinking = counts["truncated"], counts["answers"], counts["cut_in_thinking"]
    if cut <= CUT_SHARE * answers:
        return
    log.warning(
        "%d of %d answers (%.0f%%) were cut off at respond.max_new_tokens=%d%s. Raise it, in another directory%s",
        cut,
        answers,
        100 * cut / answers,
        limit,
        f", {in_thinking} of them inside their thinking: these teach thinking alone" if in_thinking else "",
        ", or switch thinking off (target.template_kwargs={enable_thinking: false})" if in_thinking else "",
    )


def plan_requests(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Request], Counter[str]]:
    """Return the requests, and the number of skipped ones by reason, such as a prompt that is too long for the context.

    Raises:
        ValueError: a split has no instruction, or no prompt of a split fits into the context.
    """
    settings, instructions = cfg.respond, read_instructions(f"{cfg.inputs.data}/instructions.jsonl")
    context = context_limit(target_source(cfg))
    requests, skipped = [], Counter[str]()
    for split in settings.splits:
        number = settings.num_responses if split == "train" else settings.num_responses // 10
        chosen = [row for row in instructions if row["split"] == split]
        if settings.by == "reference":
            skipped["no reference answer"] += sum(not row.get("reference") for row in chosen)
            chosen = [row for row in chosen if row.get("reference")]
        encoded = [encode_instruction(row, tokenizer, settings.turns, settings.by == "log") for row in chosen]
        usable = [one for one in encoded if isinstance(one, Instruction)]
        skipped.update(one for one in encoded if isinstance(one, str))
        if not usable:
            raise ValueError(
                f"{cfg.inputs.data} has no {split} instructions for respond.by={settings.by}: {dict(skipped)}"
            )
        if settings.by == "log":
            number = min(number, len(usable))  # a logged answer is taken once
        if settings.all_temperatures:
            number = len(usable) * len(settings.temperatures)
        wanted = plan(usable, list(settings.temperatures), number)
        fitting = [request for request in wanted if len(request.prompt_ids) + settings.max_new_tokens <= context]
        if not fitting:
            raise ValueError(
                f"each of the {len(wanted)} {split} prompts exceeds the context of {context} tokens with "
                f"respond.max_new_tokens={settings.max_new_tokens}: lower it"
            )
        skipped[f"prompt and max_new_tokens exceed the context of {context}"] += len(wanted) - len(fitting)
        requests += fitting
    return requests, +skipped


def encode_instruction(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, turns: str, from_log: bool
) -> Instruction | str:
    """Return an instruction with its first prompt, or the reason why it cannot be answered."""
    try:
        conversation = read_conversation(row)
        points = choose_points(conversation, turns, only_logged=from_log)
        if not points:
            return "no logged answer" if from_log else "no message to answer"
        return Instruction(row, *begin(tokenizer, conversation, points))
    except UnusableConversation as problem:
        return problem.reason


def engine_with_states(cfg: DictConfig, limits: Limits, ranks: Ranks, requests: list[Request]) -> StatesEngine:
    """Build the generator of `respond.states`: the target, which keeps its hidden states."""
    if ranks.first:
        log_ignored_settings(target_source(cfg))
    target = load_target(target_source(cfg)).to(ranks.device)
    return states_engine(target, limits, cfg.respond.batch_tokens, cfg.respond.states, requests)


def engine(cfg: DictConfig, limits: Limits, ranks: Ranks, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Build the generator that `respond.by` selects; `respond.engine` selects how the target generates."""

    def target() -> Engine:
        if ranks.first:
            log_ignored_settings(target_source(cfg))
        if cfg.respond.engine == "vllm":
            return vllm_engine(target_source(cfg), limits, cfg.seed, **plain(cfg.respond.vllm))
        if cfg.respond.engine == "openai":
            return openai_engine(cfg, limits, tokenizer)
        return transformers_engine(load_target(target_source(cfg)).to(ranks.device), limits, cfg.respond.batch_tokens)

    def drafter() -> Engine:
        model = frozen_drafter(cfg, cfg.inputs.drafter).to(ranks.device)
        if ranks.first:
            log_ignored_settings(cfg.inputs.drafter)
        return transformers_engine(model, limits, cfg.respond.batch_tokens)

    def reference() -> Engine:
        if not limits.stop_ids:
            raise ValueError(
                f"respond.by=reference: {cfg.target.path} names no end of text, so that no reference answer would end"
            )
        answers = {row["id"]: row["reference"] for row in read_instructions(f"{cfg.inputs.data}/instructions.jsonl")}
        encoded = encode_text(tokenizer, list(answers.values()))
        ended = ([*ids, *limits.stop_ids[:1]][: limits.max_new_tokens] for ids in encoded)
        return references_engine(dict(zip(answers, ended, strict=True)))

    by = {
        "target": target,
        "drafter": drafter,
        "reference": reference,
        "mixture": lambda: mixed_engine([target(), drafter()]),
        "log": lambda: log_engine(tokenizer, limits.stop_ids),
    }
    return by[cfg.respond.by]()


def openai_engine(cfg: DictConfig, limits: Limits, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Build the engine that asks the server of `respond.openai`, whose key is in the environment.

    Raises:
        ServerError: the server cannot be used; says why.
    """
    how = cfg.respond.openai
    key = os.environ.get(how.api_key_variable, "").strip()
    client = HttpClient(how.url, key, Retries(how.timeout, how.retries, how.patience))
    probe = encode_prompt(tokenizer, "Name three colours of the rainbow.")
    return served_engine(client, how.model, tokenizer, limits, cfg.seed, probe, how.concurrency)


def log_ignored_settings(model: Model) -> None:
    """Log the settings of a model's generation config that are not applied to its responses."""
    if found := ignored_settings(model):
        log.info(
            "generation_config.json of %s sets %s: these are not applied, because responses are sampled from the "
            "model's distribution at the temperature and top-p of the config",
            ModelSource.from_model(model).path,
            ", ".join(f"{name}={value}" for name, value in found.items()),
        )
