"""Stage 3: finetune the drafter to match the target's distributions. Config: conf/finetune.yaml."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.artifacts.manifest import fingerprint, read_manifest, require
from drafter.artifacts.rows import Rows
from drafter.data.target_cache import format_kind, require_output_embedding
from drafter.decoding.acceptance import check_rules
from drafter.losses.chunked import Head, Predicted
from drafter.losses.distributions import Drawn
from drafter.losses.objective import Loss
from drafter.models.compatibility import check_pair, drafter_source, load_drafter
from drafter.models.fingerprints import model_fingerprint
from drafter.models.inspection import vocabulary_rows
from drafter.models.loading import context_length, context_limit, load_output_embedding, load_target, load_tokenizer
from drafter.models.sharding import check_parallel
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Distillation, check_precision
from drafter.training.samples import Mixture, PackedText, Responses, text_samples
from drafter.training.weighting import Weighting
from experiments.running import dry_run, on_policy
from experiments.running.commands import command
from experiments.running.identity import finetuned_identity, named_values
from experiments.running.inputs import claim, pair_inputs, plain, responses_fingerprint, target_source
from experiments.running.keeping import check_kept, choose_tokens, training_responses
from experiments.running.lengths import warn_of_context
from experiments.running.losses import POSITIONS, TRIMMED, build_loss, try_loss
from experiments.running.training import KeptSteps, configure_memory, optimization, save, train, training_settings

log = logging.getLogger(__name__)


@command("finetune")
def main(cfg: DictConfig) -> None:
    """Run one finetuning, or several rounds on responses that the drafter generates (conf/distillation)."""
    if cfg.dry_run:
        return dry_run.show(cfg, "finetune", check)
    if cfg.distillation.rounds:
        on_policy.run(cfg, finetune)
    else:
        finetune(cfg)


def finetune(cfg: DictConfig) -> None:
    """Load target, drafter, responses and cache, check that they belong together, train and save."""
    loss, weighting = check(cfg)
    inputs = checked_inputs(cfg, loss)
    stage = claim(cfg, "finetune", settings_of(cfg), inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    lightning.seed_everything(cfg.seed, verbose=False)
    source = target_source(cfg)
    drafter = load_drafter(cfg.inputs.drafter, source, cfg.pad_vocabulary, whole=True)
    chosen = choose_tokens(cfg, "finetune", cfg.inputs.drafter, training_responses(cfg))
    target = (load_output_embedding if cfg.inputs.cache else load_target)(source)
    for directory in filter(None, (cfg.inputs.cache, cfg.inputs.cache and cfg.inputs.validation)):
        require_output_embedding(directory, target.get_output_embeddings())
    tokenizer = load_tokenizer(source)
    models = [drafter]
    if cfg.weighting.reference:
        check_pair(source, cfg.weighting.reference)
        models.append(load_target(drafter_source(cfg.weighting.reference, source)))
        weighting = partial(weighting, reference=models[-1], batch_tokens=cfg.finetune.batch_tokens)
    data, judged_on = samples(cfg, drafter, min(map(context_length, models)))
    module = Distillation(
        target,
        configure_memory(drafter, cfg.finetune),
        loss,
        cfg.finetune.text_share,
        cfg.finetune.learning_rate,
        optimization(cfg),
        weighting=weighting,
        num_speculative_tokens=cfg.finetune.num_speculative_tokens,
        response_top_p=float(judged_on.schema.metadata[b"top_p"]),
        shard_target=cfg.target.parallel == "fsdp",
        batch_tokens=cfg.finetune.batch_tokens,
        kept=chosen.kept,
        sampled=chosen.sampled,
        acceptance_rules=plain(cfg.finetune.acceptance_rules),
    )
    identity = finetuned_identity(cfg)
    steps = KeptSteps(stage.directory, cfg.name, tokenizer, cfg.finetune.keep_every, identity, chosen.kept)
    trainer = train(module, data, stage, cfg.finetune, cfg, cfg.name, [steps])
    save(drafter, tokenizer, stage, trainer, chosen.kept)


def samples(cfg: DictConfig, drafter: PreTrainedModel, context: int) -> tuple[SequenceData, Rows]:
    """Return the training and validation data, and the rows that the validation responses come from.

    All sequences are cut at `context` tokens, and a warning says what that costs.
    """
    kind = "cache" if cfg.inputs.cache else "respond"
    rows = Rows(cfg.inputs.cache or cfg.inputs.responses, kind)
    judged_on = Rows(cfg.inputs.validation, kind) if cfg.inputs.validation else rows
    vocabulary = vocabulary_rows(drafter)  # equal to the target's, which loading the drafter has checked
    text_length = min(cfg.finetune.sequence_length, context)
    text = PackedText(Path(cfg.inputs.data) / "train.npy", text_length, vocabulary)
    responses = Responses(rows, "train", cfg.finetune.responses_share, cfg.finetune.kinds, vocabulary, context)
    training = Mixture(responses, text, cfg.finetune.text_share, cfg.seed)
    judges = Responses(judged_on, "validation", cfg.finetune.validation_share, vocabulary=vocabulary, context=context)
    warn_of_context(cfg, context, context_limit(target_source(cfg)), responses.beyond, judges.beyond)
    return SequenceData(training, judges, cfg.finetune.batch_size, cfg.seed, cfg.finetune.num_workers), judged_on


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that determine the result, and the fields that say which drafter it is.

    A weighting's reference drafter is an input: its fingerprint counts, wherever it lies.
    """
    weighting = named_values(cfg.weighting, "weighting")
    del weighting["reference"]
    return {
        **training_settings(cfg, "finetune"),
        **finetuned_identity(cfg)._asdict(),
        "loss_settings": named_values(cfg.loss, "loss"),
        "weighting_settings": weighting,
        "target_dtype": cfg.target.dtype,
    }


def check(cfg: DictConfig) -> tuple[Loss, Weighting]:
    """Return the loss and the weighting, after trying both on two positions, so that wrong settings fail at once."""
    check_precision(cfg.trainer.precision)
    optimization(cfg)
    check_rules(plain(cfg.finetune.acceptance_rules))
    if not cfg.inputs.cache:
        check_parallel(cfg.target.parallel, "fsdp", "finetune")
    trimmed = check_kept(cfg, "finetune", cfg.inputs.drafter)
    loss = build_loss(cfg.loss, trimmed, sampled=bool(cfg.finetune.sampled_tokens))
    fields = {name: value for name, value in plain(cfg.weighting).items() if name != "reference"}  # loaded later
    weighting: Weighting = hydra.utils.instantiate(fields)
    zeros = torch.zeros(2, 2)
    if not cfg.weighting.reference:
        seen = Predicted(zeros, Head(zeros), lambda rows: TRIMMED if trimmed else zeros[rows], POSITIONS)
        weighting(seen, batch=None)
    text_samples(0, cfg.finetune.text_share)
    return loss, weighting


def checked_inputs(cfg: DictConfig, loss: Loss) -> dict[str, str]:
    """Return the fingerprints of the inputs. Raise if they do not belong together or do not suit the loss."""
    inputs = pair_inputs(cfg, cfg.inputs.drafter)
    if cfg.inputs.cache:
        inputs["cache"] = fingerprint(cfg.inputs.cache, "cache")
        cache = read_manifest(cfg.inputs.cache, "cache")
        require(cfg.inputs.cache, "target", cache["inputs"]["target"], inputs["target"])
        if format_kind(cfg.inputs.cache) == "sparse":
            if check_kept(cfg, "finetune", cfg.inputs.drafter):
                raise ValueError(
                    f"inputs.cache is {cfg.inputs.cache}, which is sparse and has no distribution over the kept "
                    f"tokens: use an exact cache (cache=exact) or a live target (inputs.cache=null)"
                )
            try_loss(loss, Drawn.from_logits(torch.zeros(2, 2), POSITIONS.tokens_N, 1, num_samples=1).weighted())
    else:
        inputs["responses"] = responses_fingerprint(cfg)
    if cfg.inputs.validation:
        kind = "cache" if cfg.inputs.cache else "respond"
        judge = read_manifest(cfg.inputs.validation, kind)
        require(cfg.inputs.validation, "target", judge["inputs"]["target"], inputs["target"])
        inputs["validation"] = fingerprint(cfg.inputs.validation, kind)
    if cfg.weighting.reference:
        inputs["reference"] = model_fingerprint(cfg.weighting.reference)
    return inputs


if __name__ == "__main__":
    main()
