"""Write the distillation set of `respond.by=replay`: the target's responses, with drafts replayed from rejections."""

import logging
from typing import Any

from omegaconf import DictConfig

from drafter.artifacts import rows
from drafter.artifacts.manifest import read_manifest
from drafter.data.replays import Pair, Replay, write_replays
from drafter.data.states import without_states
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import load_target, load_tokenizer
from drafter.ranks import join, wait_for_all
from experiments.running.inputs import (
    claim,
    frozen_drafter,
    responses_fingerprint,
    target_inputs,
    target_named,
    target_source,
)
from experiments.running.progress import Progress

log = logging.getLogger(__name__)


def write(cfg: DictConfig) -> None:
    """Replay drafting from rejections in the responses of `inputs.responses`, shard by shard."""
    inputs = {"responses": text_fingerprint(cfg), **target_inputs(cfg)}
    inputs["drafter"] = model_fingerprint(cfg.inputs.drafter)
    stage = claim(cfg, "respond", settings_of(cfg), inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    ranks, settings = join(cfg.target.parallel == "tensor"), cfg.respond
    source = target_source(cfg)
    responses = rows.Rows(cfg.inputs.responses, "respond")
    stop_ids = end_of_turn_ids(source, load_tokenizer(source))
    top_p = float(responses.schema.metadata[b"top_p"])
    pair = Pair(load_target(source).to(ranks.device), frozen_drafter(cfg, cfg.inputs.drafter).to(ranks.device))
    with Progress("respond", "row", ranks.world_size) as progress:
        count = write_replays(
            pair,
            responses,
            stage.folder,
            Replay(settings.replay.per_response, settings.replay.num_speculative_tokens, top_p, stop_ids),
            batch_tokens=settings.batch_tokens,
            shard_size=settings.shard_size,
            seed=cfg.seed,
            world_size=ranks.world_size,
            writes=ranks.writes,
            report=progress,
        )
    wait_for_all()
    if ranks.first:
        files, notes = rows.finish(stage.folder, count, without_states(responses.schema))
        counts: dict[str, Any] = {name: sum(note[name] for note in notes) for name in notes[0]}
        stage.finish(files, {**counts, "stop_ids": stop_ids, "target": target_named(cfg)})
        log.info("%s: %s", cfg.out, counts)
    wait_for_all()  # the next stage of this process may read the responses


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that determine the rows and their files: those of the responses are in the responses."""
    settings = cfg.respond
    replay = {name: settings.replay[name] for name in ("per_response", "num_speculative_tokens")}
    fixed = {"by": settings.by, "shard_size": settings.shard_size, "seed": cfg.seed}
    return {**fixed, **replay, "target_dtype": cfg.target.dtype}


def text_fingerprint(cfg: DictConfig) -> str:
    """Return the fingerprint of the responses that are replayed.

    Raises:
        ValueError: there are none, or another model or a person wrote them, so that rejections could not be sampled.
    """
    if not cfg.inputs.responses:
        raise ValueError("respond.by=replay needs the target's responses: give distillation=replay or inputs.responses")
    by = read_manifest(cfg.inputs.responses, "respond")["settings"]["by"]
    if by not in ("target", "log"):
        raise ValueError(
            f"{cfg.inputs.responses} has responses by '{by}': respond.by=replay needs the target's own (by target or "
            f"log). Give them as inputs.responses"
        )
    return responses_fingerprint(cfg)
