"""Stage 2: generate responses to the instructions, by the model in conf/distillation. Config: conf/respond.yaml."""

from omegaconf import DictConfig

from experiments.running import dry_run, responding, response_settings
from experiments.running.commands import command

check = response_settings.check


@command("respond")
def main(cfg: DictConfig) -> None:
    """Generate the responses shard by shard."""
    if cfg.dry_run:
        return dry_run.show(cfg, "respond", check)
    responding.respond(cfg)


if __name__ == "__main__":
    main()
