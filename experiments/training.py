"""One Lightning run: loggers, checkpoint, resume, validation before the first step."""

import logging
import os
import shutil
from pathlib import Path

import hydra
import lightning
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.artifacts import Stage
from drafter.datamodules import SequenceData
from drafter.ranks import leave_at_exit

log = logging.getLogger(__name__)


def train(
    module: lightning.LightningModule,
    data: SequenceData,
    stage: Stage,
    settings: DictConfig,
    cfg: DictConfig,
    name: str,
) -> lightning.Trainer:
    """Fit for settings.max_steps, going on from the checkpoint that an interrupted run has left."""
    leave_at_exit()
    checkpoints = stage.directory / "checkpoints"
    interval = min(settings.validate_every, settings.max_steps)
    trainer: lightning.Trainer = hydra.utils.instantiate(
        cfg.trainer,
        max_steps=settings.max_steps,
        max_epochs=-1,
        val_check_interval=interval * cfg.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        log_every_n_steps=max(1, min(10, settings.max_steps, len(data.train_dataloader()))),
        logger=loggers(cfg, stage, name),
        callbacks=[ModelCheckpoint(checkpoints, every_n_train_steps=interval, save_last=True, save_top_k=0)],
    )
    last = checkpoints / "last.ckpt"
    if not last.exists():
        trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True if last.exists() else None)
    if wandb.run is not None:
        wandb.finish()
    return trainer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage, trainer: lightning.Trainer) -> None:
    """Write the trained model beside its logs as a Hugging Face directory, and finish the stage (rank 0 alone)."""
    if trainer.is_global_zero:
        model.save_pretrained(stage.directory)
        tokenizer.save_pretrained(stage.directory)
        shutil.rmtree(stage.directory / "checkpoints", ignore_errors=True)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        stage.finish(counts={"steps": trainer.global_step, **metrics})
    trainer.strategy.barrier()


def loggers(cfg: DictConfig, stage: Stage, name: str) -> list[Logger]:
    """A CSV file always; Weights & Biases if configured, offline unless logged in, and never a reason to fail."""
    result: list[Logger] = [CSVLogger(stage.directory, name="logs", version="")]
    if not cfg.logger.wandb or int(os.environ.get("RANK", 0)) > 0:
        return result
    try:
        wandb.finish()  # the run before, in a sweep
        folder = Path(cfg.root).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        logger = WandbLogger(
            name=name,
            save_dir=folder,
            project=cfg.logger.project,
            group=cfg.logger.group,
            job_type=stage.identity["stage"],
            tags=[cfg.scale.name],
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
            config={"stage": stage.identity, "config": OmegaConf.to_container(cfg)},
        )
        _ = logger.experiment  # starts the run: what can fail, fails here
        result.append(logger)
    except Exception as problem:  # any failure of a third party's logging is worth one line, not the run
        log.warning("Weights & Biases is off for this run: %s", problem)
    return result
