"""Stage 1: pretrain a drafter from scratch by next-token prediction. Config: conf/pretrain.yaml."""

import logging
from pathlib import Path

import lightning
import torch
from omegaconf import DictConfig

from drafter.decoding.capabilities import check_can_decode
from drafter.models.inspection import check_drafter_head, check_positions, vocabulary_rows
from drafter.models.loading import context_length, load_tokenizer
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Pretraining, check_precision
from drafter.training.samples import PackedText
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.inputs import claim, data_fingerprint, new_drafter, plain, target_source
from experiments.running.training import configure_memory, save, train, training_settings

log = logging.getLogger(__name__)


@command("pretrain")
def main(cfg: DictConfig) -> None:
    """Build the drafter for the target's vocabulary, train it on packed text, save it."""
    if cfg.dry_run:
        return dry_run.show(cfg, "pretrain", check)
    check(cfg)
    settings = {**training_settings(cfg, "pretrain"), "drafter": plain(cfg.drafter)}
    stage = claim(cfg, "pretrain", settings, {"data": data_fingerprint(cfg)})
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    lightning.seed_everything(cfg.seed, verbose=False)
    tokenizer = load_tokenizer(target_source(cfg))
    drafter = configure_memory(new_drafter(cfg, tokenizer), cfg.pretrain)
    folder, length, rows = Path(cfg.inputs.data), cfg.pretrain.sequence_length, vocabulary_rows(drafter)
    text, heldout = (PackedText(folder / name, length, rows) for name in ("train.npy", "heldout.npy"))
    data = SequenceData(text, heldout, cfg.pretrain.batch_size, cfg.seed, cfg.pretrain.num_workers)
    if length < (context := context_length(drafter)):
        log.info(
            "sequences have %d tokens and the drafter's context is %d: finetuning alone will train the positions "
            "beyond pretrain.sequence_length, as far as its responses reach",
            length,
            context,
        )
    name = f"pretrain{cfg.differs}"
    trainer = train(Pretraining(drafter, cfg.pretrain.learning_rate), data, stage, cfg.pretrain, cfg, name)
    save(drafter, tokenizer, stage, trainer)


def check(cfg: DictConfig) -> None:
    """Raise on float16, and on a drafter that cannot be distilled or decoded with, or has too few positions.

    The drafter is built without weights, so that the check takes no memory.

    Raises:
        ValueError: names the precision or the architecture.
    """
    check_precision(cfg.trainer.precision)
    tokenizer = load_tokenizer(target_source(cfg))
    with torch.device("meta"):
        drafter = new_drafter(cfg, tokenizer)
    check_can_decode(drafter.config)
    check_drafter_head(drafter)
    check_positions(drafter, cfg.pretrain.sequence_length, "sequences of text (pretrain.sequence_length)")


if __name__ == "__main__":
    main()
