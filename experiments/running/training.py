"""Train a module with Lightning: loggers, resuming, and validation before the first and after the last step."""

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter import interruptions
from drafter.artifacts.manifest import CHECKPOINTS, Stage, write_json
from drafter.data.batches import Batch
from drafter.losses.trimmed import Kept
from drafter.models.loading import save_tokenizer
from drafter.models.trimming import write_kept
from drafter.ranks import leave_at_exit
from drafter.training.datamodules import SequenceData
from drafter.training.optimizers import Optimization
from drafter.training.resuming import AtomicCheckpoints, Resuming
from experiments.reporting.identity import IDENTITY, STEPS, DrafterIdentity
from experiments.running.identity import choice, named_values, values, without_defaults
from experiments.running.inputs import plain
from experiments.running.progress import Progress
from experiments.running.recording import OneRun, finish_run, run_settings

log = logging.getLogger(__name__)


# Settings of a training stage that change its model at most by rounding.
MEANS = {"num_workers", "keep_every", "validation_share", "gradient_checkpointing", "compile", "batch_tokens"}
TRAINER_MEANS = {
    "_target_",
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "num_sanity_val_steps",
    "inference_mode",
    "enable_model_summary",
    "enable_progress_bar",
    "use_distributed_sampler",
    "benchmark",
    "profiler",
}
# Settings that the identity has only where they differ from these values; `teaching` has those of the distillation.
LEFT_OUT = {"kept_tokens": None, "sampled_tokens": None, "acceptance_rules": ["ratio"]}


def training_settings(cfg: DictConfig, section: str) -> dict[str, Any]:
    """Return the settings that determine the result of a training stage: its section, the trainer and the seed."""
    means = MEANS | {"distillation"}
    settings = {name: value for name, value in plain(cfg[section]).items() if name not in means}
    settings = without_defaults(settings, LEFT_OUT)
    trainer = {name: values(value) for name, value in plain(cfg.trainer).items() if name not in TRAINER_MEANS}
    how = {group: named_values(cfg[group], group) for group in ("optimizer", "schedule")}
    return {**settings, **how, "trainer": trainer, "seed": cfg.seed}


def optimization(cfg: DictConfig) -> Optimization:
    """Build the optimizer and the schedule of the learning rate.

    Raises:
        ValueError: the optimizer cannot be used with the trainer's strategy.
    """
    if choice("optimizer") == "muon" and not isinstance(cfg.trainer.strategy, str):
        raise ValueError("optimizer=muon needs complete matrices, and this trainer shards them: give optimizer=adamw")
    return Optimization(hydra.utils.instantiate(cfg.optimizer), hydra.utils.instantiate(cfg.schedule))


def configure_memory(model: PreTrainedModel, settings: DictConfig) -> PreTrainedModel:
    """Return the model with gradient checkpointing and torch.compile, where the settings enable them."""
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        model.base_model.compile(dynamic=True)
    return model


def train(
    module: lightning.LightningModule,
    data: SequenceData,
    stage: Stage,
    settings: DictConfig,
    cfg: DictConfig,
    name: str,
    callbacks: Sequence[lightning.Callback] = (),
) -> lightning.Trainer:
    """Train for settings.max_steps, from the checkpoint of an interrupted run if there is one."""
    leave_at_exit()
    last = stage.directory / CHECKPOINTS / "last.ckpt"
    interval = min(settings.validate_every, settings.max_steps)
    curve = CSVLogger(stage.directory, name="logs", version="")
    for stale in last.parent.glob(".*.tmp"):
        stale.unlink(missing_ok=True)  # every rank tries to remove them
    with finish_run(), warnings.catch_warnings():
        # The curve of an interrupted run is restored from its checkpoint.
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        trainer: lightning.Trainer = hydra.utils.instantiate(
            cfg.trainer,
            max_steps=settings.max_steps,
            max_epochs=-1,
            val_check_interval=interval * cfg.trainer.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            log_every_n_steps=max(1, min(10, settings.max_steps)),
            logger=[curve, *weights_and_biases(cfg, stage, name)],
            plugins=[AtomicCheckpoints()],
            enable_checkpointing=False,  # Resuming writes the checkpoints
            enable_progress_bar=False,  # TrainingProgress instead
            callbacks=[*callbacks, Resuming(last, curve, cfg.seed), TrainingProgress(name)],
        )
        if not last.exists():
            trainer.validate(module, data, verbose=False)
        found = {"ckpt_path": last, "weights_only": True} if last.exists() else {}
        with interruptions.defer_signals():
            trainer.fit(module, data, **found)
        if settings.max_steps % interval:
            trainer.validate(module, data, verbose=False)
    return trainer


class TrainingProgress(lightning.Callback):
    """Shows the step, the loss, the tokens per second of all ranks and the time left (see progress.Progress)."""

    def __init__(self, name: str):
        self.name = name

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the progress at the step from which training continues."""
        self.progress = Progress(self.name, "step", trainer.world_size, trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        """Report the step, which stays the same until all accumulated batches are done."""

        def loss() -> float | None:
            value = trainer.callback_metrics.get("train/loss")
            return None if value is None else float(value)

        self.progress(trainer.global_step, trainer.max_steps, batch.attention_mask_BT.sum(), loss)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self.progress.__exit__()


class KeptSteps(lightning.Callback):
    """Saves the drafter every `every` steps as a Hugging Face directory, <directory>/steps/<name>-step<step>.

    Each has its identity beside its weights (see experiments.reporting.identity).
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        every: int,
        identity: DrafterIdentity,
        kept: Kept | None = None,
    ):
        self.folder, self.name, self.tokenizer, self.every = directory / STEPS, name, tokenizer, every
        self.identity, self.kept = identity, kept

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the drafter if it is due. The drafter of the last step is the result and is not saved here."""
        step = trainer.global_step
        path = self.folder / f"{self.name}-step{step}"
        wanted = self.every and 0 < step < trainer.max_steps and step % self.every == 0
        weights = weights_of(pl_module.drafter, trainer) if wanted else {}
        if wanted and trainer.is_global_zero and not path.exists():
            half = path.with_name(path.name + ".tmp")
            shutil.rmtree(half, ignore_errors=True)
            pl_module.drafter.save_pretrained(half, state_dict=weights)
            save_tokenizer(self.tokenizer, half)
            if self.kept is not None:
                write_kept(half, self.kept.ids_K.tolist())
            write_json(half / IDENTITY, self.identity._replace(step=step)._asdict())
            half.rename(path)


def weights_of(model: PreTrainedModel, trainer: lightning.Trainer) -> dict[str, torch.Tensor]:
    """Return the trained parameters, complete on rank 0 and each tied one once. All ranks must call this."""
    (prefix,) = (f"{name}." for name, child in trainer.lightning_module.named_children() if child is model)
    state = trainer.strategy.lightning_module_state_dict()
    return {name: state[prefix + name] for name, _ in model.named_parameters() if prefix + name in state}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    trainer: lightning.Trainer,
    kept: Kept | None = None,
) -> None:
    """Save the trained model as a Hugging Face directory beside its logs and finish the stage, on rank 0.

    Of a trimmed drafter the full model is saved, with the list of its tokens, by which `load_drafter` trims it.
    """
    weights = weights_of(model, trainer)
    if trainer.is_global_zero:
        model.save_pretrained(stage.directory, state_dict=weights)
        save_tokenizer(tokenizer, stage.directory)
        if kept is not None:
            write_kept(stage.directory, kept.ids_K.tolist())
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        judged = {"validation_samples": len(trainer.datamodule.validation)}
        stage.finish(counts={"steps": trainer.global_step, **judged, **metrics})
    trainer.strategy.barrier()


def weights_and_biases(cfg: DictConfig, stage: Stage, name: str) -> list[Logger]:
    """Return the Weights & Biases logger if it is configured (see recording)."""
    if not cfg.logger.wandb or int(os.environ.get("RANK", 0)) > 0:
        return []
    try:
        series = stage.identity["settings"].get("series", name)
        settings = run_settings(cfg, name, stage.identity["stage"], series)
        settings["config"] |= {"stage": stage.identity}
        logger = OneRun(stage.directory / "logs" / "wandb.json", settings)
        _ = logger.experiment  # starts the run, so that a failure appears here
        return [logger]
    except Exception as problem:  # a failure of logging must not end the run
        log.warning("Weights & Biases is off for this run: %s", problem)
    return []
