"""Stage 2b: store the target's distribution at every response token. Config: conf/cache.yaml."""

from omegaconf import DictConfig

from experiments.running import caching, dry_run
from experiments.running.commands import command

check = caching.check


@command("cache")
def main(cfg: DictConfig) -> None:
    """Write the cache shard by shard."""
    if cfg.dry_run:
        return dry_run.show(cfg, "cache", check)
    caching.cache(cfg)


if __name__ == "__main__":
    main()
