"""Stage 2b: the target's distributions at the response tokens. Config: conf/cache.yaml."""

import logging

import hydra
from omegaconf import DictConfig

from drafter.artifacts import Stage
from drafter.logit_cache import write_cache
from drafter.models import load_target
from drafter.ranks import join, wait_for_all
from drafter.responses import read_responses
from experiments.inputs import plain, responses_fingerprint, target_fingerprint

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="cache")
def main(cfg: DictConfig) -> None:
    """One forward of the target over every response."""
    inputs = {"responses": responses_fingerprint(cfg), "target": target_fingerprint(cfg)}
    stage = Stage(cfg.out, "cache", plain(cfg.cache), inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    ranks = join()
    target = load_target(**cfg.target).to(ranks.device)
    rows = read_responses(cfg.inputs.responses)
    write_cache(target, rows, cfg.out, **cfg.cache, rank=ranks.rank, world_size=ranks.world_size)
    wait_for_all()
    if ranks.rank == 0:
        size = sum(file.stat().st_size for file in stage.directory.glob("*.safetensors"))
        tokens = sum(len(row["response_ids"]) for row in rows)
        stage.finish(counts={"rows": len(rows), "tokens": tokens, "bytes_per_token": round(size / tokens, 1)})
        log.info("%s: %d tokens, %.1f MB", cfg.out, tokens, size / 1e6)


if __name__ == "__main__":
    main()
