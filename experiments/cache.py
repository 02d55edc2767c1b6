"""Stage 2b: the target's distributions at the response tokens. Config: conf/cache.yaml."""

from omegaconf import DictConfig

from experiments.running import caching, dry_run
from experiments.running.commands import command

check = caching.check


@command("cache")
def main(cfg: DictConfig) -> None:
    """Write the target's distribution at every response token."""
    if cfg.dry_run:
        return dry_run.show(cfg, "cache", check)
    caching.cache(cfg)


if __name__ == "__main__":
    main()
