"""Average the weights of drafters that were trained from one start. Config: conf/average.yaml.

Models that were finetuned from one start often lie in one valley of the loss. The mean of their weights is then as good
as each on their own data, and better elsewhere: Wortsman et al., "Model soups" (arXiv 2203.05482), and "Robust
fine-tuning of zero-shot models" (arXiv 2109.01903), which averages a model with what it was finetuned from. It costs
nothing when the drafter is served.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import load_tokenizer, save_tokenizer
from drafter.models.trimming import read_kept, write_kept
from experiments.reporting.identity import identity_of
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.inputs import claim, frozen_drafter, target_fingerprint, target_source

log = logging.getLogger(__name__)


@command("average")
def main(cfg: DictConfig) -> None:
    """Write the drafter with the mean of the weights.

    Raises:
        ValueError: there are fewer than two drafters, or they do not have the same weights to average.
    """
    if cfg.dry_run:
        return dry_run.show(cfg, "average", check)
    check(cfg)
    paths = list(cfg.average.drafters)
    inputs = {"target": target_fingerprint(cfg)}
    inputs |= {f"drafter {number}": model_fingerprint(path) for number, path in enumerate(paths, start=1)}
    identity = identity_of(paths[-1])
    settings = identity._replace(series=f"{identity.series}-average", step=None)._asdict()
    stage = claim(cfg, "average", settings, inputs)
    if stage.complete:
        return log.info("%s is up to date", stage.directory)
    averaged = mean_of(cfg, paths)
    averaged.save_pretrained(stage.directory)
    save_tokenizer(load_tokenizer(target_source(cfg)), stage.directory)
    if (kept := read_kept(paths[0])) is not None:
        write_kept(stage.directory, kept)
    stage.finish(counts={"drafters": len(paths)})
    log.info("%s: the mean of the weights of %s", stage.directory, ", ".join(paths))


def check(cfg: DictConfig) -> None:
    """Refuse fewer than two drafters, paths that are no directories, and drafters that keep different tokens."""
    paths = list(cfg.average.drafters)
    if len(set(paths)) < 2:
        raise ValueError(f"average.drafters is {paths}, must be two directories of drafters or more")
    if absent := [path for path in paths if not Path(path).is_dir()]:
        raise ValueError(f"average.drafters: {', '.join(absent)}: no such directory")
    if any(read_kept(path) != read_kept(paths[0]) for path in paths):
        raise ValueError(f"average.drafters: {', '.join(paths)} keep different tokens (kept_tokens.json)")


def mean_of(cfg: DictConfig, paths: list[str]) -> PreTrainedModel:
    """Return the first drafter with the mean of the weights of all, computed in float64.

    Raises:
        ValueError: the weights of two drafters differ in their names or shapes, or are not numbers; names the drafters.
    """
    first = frozen_drafter(cfg, paths[0])
    shapes = shapes_of(first)
    sums = {name: weight.double() for name, weight in first.state_dict().items()}
    for path in paths[1:]:
        drafter = frozen_drafter(cfg, path)
        if unlike := shapes.items() ^ shapes_of(drafter).items():
            raise ValueError(
                f"{paths[0]} and {path} have different weights, such as {min(unlike)[0]}: only drafters of one "
                f"architecture that were trained from one start can be averaged"
            )
        for name, weight in drafter.state_dict().items():
            sums[name] += weight.double()
    if broken := [name for name, total in sums.items() if not total.isfinite().all()]:
        raise ValueError(f"{', '.join(paths)}: the mean of {broken[0]} is not finite")
    mean: dict[str, Any] = {name: (total / len(paths)).to(torch.float32) for name, total in sums.items()}
    first.float().load_state_dict(mean)
    return first


def shapes_of(drafter: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each weight."""
    return {name: tuple(weight.shape) for name, weight in drafter.state_dict().items()}


if __name__ == "__main__":
    main()
