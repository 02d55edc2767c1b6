"""Draw the validation curves of the finetunings under a root, finished or running. Config: conf/curves.yaml."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from experiments.reporting.figures import draw_curves
from experiments.reporting.results import read_curves
from experiments.running.commands import command

log = logging.getLogger(__name__)


@command("curves")
def main(cfg: DictConfig) -> None:
    """Draw ${out}.png and .svg: a panel for each yardstick, with a line per series and a band over its seeds.

    Raises:
        ValueError: no finetuning in the folders has logged a chosen series.
    """
    curves = {name: seeds for folder in cfg.folders for name, seeds in read_curves(Path(folder)).items()}
    chosen = {name: seeds for name, seeds in curves.items() if not cfg.only or name in cfg.only}
    if not chosen:
        raise ValueError(f"no finetuning in {list(cfg.folders)} has logged {cfg.only or 'anything'}: {sorted(curves)}")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    draw_curves(chosen, Path(cfg.out))
    log.info("%s.png: %s", cfg.out, ", ".join(f"{name} ({len(seeds)})" for name, seeds in chosen.items()))


if __name__ == "__main__":
    main()
