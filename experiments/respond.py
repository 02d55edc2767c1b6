"""Stage 2: the target answers the instructions. Config: conf/respond.yaml."""

import logging

import hydra
from omegaconf import DictConfig

from drafter.artifacts import Stage, read_jsonl
from drafter.models import context_length, load_target, load_tokenizer
from drafter.prompts import encode_prompts, stop_ids
from drafter.ranks import join, wait_for_all
from drafter.responses import plan, read_responses, shards, write_responses
from experiments.inputs import data_fingerprint, plain, target_fingerprint

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="respond")
def main(cfg: DictConfig) -> None:
    """Encode the instructions, check them all, then generate shard by shard."""
    check(cfg)
    inputs = {"data": data_fingerprint(cfg), "target": target_fingerprint(cfg)}
    stage = Stage(cfg.out, "respond", {**plain(cfg.respond), "seed": cfg.seed}, inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    ranks, settings = join(), cfg.respond
    tokenizer = load_tokenizer(cfg.target.path, cfg.target.revision)
    target = load_target(**cfg.target).to(ranks.device)
    rows = read_jsonl(f"{cfg.inputs.data}/instructions.jsonl")
    prompts = encode_prompts(
        tokenizer, [row["prompt"] for row in rows], settings.max_new_tokens, context_length(target)
    )
    requests = []
    for split, number in (("train", settings.num_responses), ("validation", settings.num_responses // 10)):
        of_split = [index for index, row in enumerate(rows) if row["split"] == split]
        if not of_split or number < 1:
            raise ValueError(f"{cfg.inputs.data} has {len(of_split)} {split} instructions for {number} responses")
        chosen = [rows[index] for index in of_split], [prompts[index] for index in of_split]
        requests += plan(*chosen, list(settings.temperatures), number)
    write_responses(
        target,
        shards(requests, settings.shard_size),
        cfg.out,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids(tokenizer, target.generation_config.eos_token_id),
        batch_size=settings.batch_size,
        seed=cfg.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    wait_for_all()
    if ranks.rank == 0:
        written = read_responses(cfg.out)
        counts = {
            "responses": len(written),
            "tokens": sum(len(row["response_ids"]) for row in written),
            "truncated": sum(row["truncated"] for row in written),
        }
        stage.finish(counts=counts)
        log.info("%s: %s", cfg.out, counts)


def check(cfg: DictConfig) -> None:
    """Refuse settings that would fail, or mean something else, once the target is generating.

    Raises:
        ValueError: names the setting.
    """
    settings = cfg.respond
    for name, allowed, wanted in (
        ("temperatures", settings.temperatures and min(settings.temperatures) >= 0, "0 (greedy) or above, one or more"),
        ("top_p", 0 < settings.top_p <= 1, "above 0, at most 1"),
        ("num_responses", settings.num_responses >= 10, "at least 10 (a tenth of them beside for validation)"),
        ("max_new_tokens", settings.max_new_tokens >= 1, "at least 1"),
    ):
        if not allowed:
            raise ValueError(f"respond.{name} is {settings[name]}, must be {wanted}")


if __name__ == "__main__":
    main()
