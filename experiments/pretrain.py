"""Stage 1: build a drafter and pretrain it by next-token prediction. Config: conf/pretrain.yaml and conf/init."""

import logging
from pathlib import Path

import lightning
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drafter.artifacts.manifest import Stage
from drafter.decoding.capabilities import check_can_decode
from drafter.losses.trimmed import Kept
from drafter.models.inspection import check_drafter_head, check_positions, vocabulary_rows
from drafter.models.loading import context_length, load_tokenizer, meta_model, save_tokenizer
from drafter.models.trimming import read_kept, write_kept
from drafter.ranks import join, wait_for_all
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Pretraining, check_precision
from drafter.training.samples import PackedText
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.inputs import (
    claim,
    data_fingerprint,
    responses_fingerprint,
    target_fingerprint,
    target_source,
)
from experiments.running.keeping import check_kept, choose_tokens, packed_text, training_responses
from experiments.running.starts import check_start, empty_drafter, new_drafter, start_identity
from experiments.running.teaching import build_teacher, check_teacher, teaching_settings
from experiments.running.training import configure_memory, optimization, save, train, training_settings

log = logging.getLogger(__name__)


@command("pretrain")
def main(cfg: DictConfig) -> None:
    """Build the drafter, train it on packed text, save it."""
    if cfg.dry_run:
        return dry_run.show(cfg, "pretrain", check)
    check(cfg)
    start, made_of = start_identity(cfg)
    settings = {**training_settings(cfg, "pretrain"), **start, **teaching_settings(cfg)}
    stage = claim(cfg, "pretrain", settings, {"data": data_fingerprint(cfg), **made_of, **other_inputs(cfg)})
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    lightning.seed_everything(cfg.seed, verbose=False)
    tokenizer = load_tokenizer(target_source(cfg))
    drafter = new_drafter(cfg, tokenizer)
    folder, length, rows = Path(cfg.inputs.data), cfg.pretrain.sequence_length, vocabulary_rows(drafter)
    texts = training_responses(cfg) if cfg.inputs.responses else packed_text(folder / "train.npy")
    chosen = choose_tokens(cfg, "pretrain", trimmed_start(cfg), texts)
    if not cfg.pretrain.max_steps:
        return save_start(drafter, tokenizer, stage, chosen.kept)
    configure_memory(drafter, cfg.pretrain)
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
    module = Pretraining(
        drafter, cfg.pretrain.learning_rate, optimization(cfg), chosen.kept, build_teacher(cfg), chosen.sampled
    )
    trainer = train(module, data, stage, cfg.pretrain, cfg, name)
    save(drafter, tokenizer, stage, trainer, chosen.kept)


def other_inputs(cfg: DictConfig) -> dict[str, str]:
    """Return the fingerprints of what some settings read: the responses, whose tokens are kept, and the target."""
    responses = {"responses": responses_fingerprint(cfg)} if reads_responses(cfg) else {}
    return responses | ({"target": target_fingerprint(cfg)} if cfg.pretrain.distillation.weight else {})


def reads_responses(cfg: DictConfig) -> bool:
    """Return whether the target's responses decide which tokens the drafter keeps."""
    start = trimmed_start(cfg)
    has_list = start is not None and read_kept(start) is not None
    return bool(cfg.inputs.responses and cfg.pretrain.kept_tokens) and not has_list


def trimmed_start(cfg: DictConfig) -> str | None:
    """Return the directory of the drafter that pretraining starts from, whose list of tokens it keeps."""
    return str(cfg.init.path) if cfg.init.kind == "existing" else None


def save_start(drafter: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage, kept: Kept | None) -> None:
    """Finish the stage with the drafter as it starts, for a start that needs no pretraining."""
    ranks = join()
    if ranks.first:
        drafter.save_pretrained(stage.directory)
        save_tokenizer(tokenizer, stage.directory)
        if kept is not None:
            write_kept(stage.directory, kept.ids_K.tolist())
        stage.finish(counts={"steps": 0})
        log.info("%s is the start itself: pretrain.max_steps is 0", stage.directory)
    wait_for_all()


def check(cfg: DictConfig) -> None:
    """Raise on float16, and on a drafter that cannot be distilled or decoded with, or has too few positions.

    The drafter is built without weights, so that the check takes no memory.

    Raises:
        ValueError: names the precision or the architecture.
    """
    check_precision(cfg.trainer.precision)
    optimization(cfg)
    drafter = empty_drafter(cfg, meta_model(target_source(cfg)))
    check_start(cfg)
    check_can_decode(drafter.config)
    check_drafter_head(drafter)
    check_teacher(cfg, trimmed=check_kept(cfg, "pretrain", trimmed_start(cfg)))
    check_positions(drafter, cfg.pretrain.sequence_length, "sequences of text (pretrain.sequence_length)")


if __name__ == "__main__":
    main()
