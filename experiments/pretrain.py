"""Stage 1: a drafter from scratch by next-token prediction. Config: conf/pretrain.yaml."""

import logging
from pathlib import Path

import lightning
from omegaconf import DictConfig

from drafter.datamodules import PackedText, SequenceData
from drafter.loading import load_tokenizer, vocabulary_width
from drafter.models import build_drafter, special_ids
from drafter.modules import Pretraining
from experiments import dry_run
from experiments.commands import command
from experiments.inputs import claim, data_fingerprint, plain, target_source
from experiments.training import economical, save, train, training_settings

log = logging.getLogger(__name__)


@command("pretrain")
def main(cfg: DictConfig) -> None:
    """Build the drafter for the target's vocabulary, train it on packed text, save it."""
    if cfg.dry_run:
        return dry_run.show(cfg, "pretrain")
    settings = {**training_settings(cfg, "pretrain"), "drafter": plain(cfg.drafter)}
    stage = claim(cfg, "pretrain", settings, {"data": data_fingerprint(cfg)})
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    lightning.seed_everything(cfg.seed, verbose=False)
    target = target_source(cfg)
    tokenizer = load_tokenizer(target)
    drafter = build_drafter(plain(cfg.drafter), vocabulary_width(target), special_ids(tokenizer))
    drafter = economical(drafter, cfg.pretrain)
    folder, length = Path(cfg.inputs.data), cfg.pretrain.sequence_length
    text, heldout = (PackedText(folder / name, length) for name in ("train.npy", "heldout.npy"))
    data = SequenceData(text, heldout, cfg.pretrain.batch_size, cfg.seed, cfg.pretrain.num_workers)
    name = f"pretrain{cfg.differs}"
    trainer = train(Pretraining(drafter, cfg.pretrain.learning_rate), data, stage, cfg.pretrain, cfg, name)
    save(drafter, tokenizer, stage, trainer)


if __name__ == "__main__":
    main()
