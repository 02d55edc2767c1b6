"""The two LightningModules: `Pretraining` (next-token loss) and `Distillation` (a loss against the target).

If some tokens are `kept`, the drafter is trimmed (see `models.trimming`): logits of the kept tokens alone are computed,
and the rows of the others in the output embedding are not trained. The next-token loss is a mean over the next tokens
that are kept; `losses.trimmed.Trimmed` says what a distillation loss is, and `yardsticks` what is logged. If tokens are
`sampled`, each training step computes the logits of some tokens, but the drafter proposes all, as validation measures.

Shapes: B sequences, T tokens, P predicted positions of a batch, N of them in responses, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import torch
from torch import nn
from transformers import PreTrainedModel

from drafter.data.batches import Batch, next_tokens, response_mask
from drafter.data.forward import hidden_at
from drafter.losses.chunked import Head, Predicted
from drafter.losses.objective import Loss, Objective, objective_of
from drafter.losses.trimmed import Kept, SampledTokens
from drafter.models.inspection import check_drafter_head, hidden_states
from drafter.models.loading import OutputEmbedding
from drafter.models.sharding import shard_module
from drafter.training.frozen import FrozenTarget
from drafter.training.next_token import next_token_mean, next_token_sum
from drafter.training.optimizers import Optimization
from drafter.training.weighting import Weighting, uniform
from drafter.training.yardsticks import Yardsticks


class Teacher(NamedTuple):
    """A target whose distribution a drafter is pretrained on, beside the next token.

    Attributes:
        target: the frozen target.
        loss: (logits_p_NV, logits_q_NV) -> values (N,); see `drafter.losses`.
        weight: the weight of this loss, in (0, 1]; the next-token loss has the rest.
    """

    target: FrozenTarget
    loss: Loss | Objective
    weight: float


class Pretraining(lightning.LightningModule):
    """Next-token prediction (paper, section 2.1), mixed with a loss against the target if there is a teacher.

    The loss is (1 - weight) x the next-token loss + weight x the teacher's loss, each a mean over the positions of the
    packed text.

    Args:
        model: the trainable causal LM.
        learning_rate: the largest of the schedule.
        optimization: the optimizer and the schedule.
        kept: the tokens that the model is to propose; None: all.
        sampled: the tokens that a step trains a model with that is to propose all; None: all.
        teacher: the target, its loss and their weight; None: next-token prediction alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        learning_rate: float,
        optimization: Optimization = Optimization(),  # noqa: B008 (immutable)
        kept: Kept | None = None,
        teacher: Teacher | None = None,
        sampled: SampledTokens | None = None,
    ):
        super().__init__()
        check_drafter_head(model)
        self.model, self.learning_rate, self.optimization = model, learning_rate, optimization
        self.kept, self.sampled, self.teacher = kept, sampled, teacher
        self._yardsticks = Yardsticks()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_module(self, self.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        place_tokens(self)
        if self.teacher is not None:
            self.teacher.target.prepare(self.device)

    on_validation_start = on_fit_start

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        hidden_PH, kept = self._hidden(batch), tokens_of_step(self)
        loss = self._next_token_loss(batch, hidden_PH, kept)
        if self.teacher is not None:
            self.log("train/next_token_loss", loss, sync_dist=True)
            predicted = self._predicted(self.teacher, batch, hidden_PH, kept)
            objective = with_batch_mean(objective_of(self.teacher.loss), predicted, self.trainer)
            distilled = predicted.sum(objective) / len(hidden_PH)
            loss = (1 - self.teacher.weight) * loss + self.teacher.weight * distilled
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        hidden_PH = self._hidden(batch)
        loss, count = self._next_token_loss(batch, hidden_PH, self.kept), len(hidden_PH)
        if self.kept is not None:
            kept_P = self.kept.mask(next_tokens(batch)[batch.target_mask_BT])
            self.log("val/kept_share", kept_P.float().mean(), batch_size=count, sync_dist=True)
            count = int(kept_P.sum())
        name = "val/loss" if self.kept is None else "val/loss_kept"
        self.log(name, loss, prog_bar=True, batch_size=count, sync_dist=True)
        if self.teacher is not None:
            self._yardsticks.add(self._predicted(self.teacher, batch, hidden_PH, self.kept), _as_response(batch))

    def on_validation_epoch_end(self) -> None:
        if self.teacher is not None:
            self._yardsticks.finish(self, trimmed=self.kept is not None)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        clip(optimizer, gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        return self.optimization.configure(self.model, self.learning_rate, steps)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return hidden_states(self.model, batch.input_ids_BT, batch.attention_mask_BT)[batch.target_mask_BT]

    def _next_token_loss(self, batch: Batch, hidden_PH: torch.Tensor, kept: Kept | None) -> torch.Tensor:
        return next_token_mean(self.model, hidden_PH, next_tokens(batch)[batch.target_mask_BT], kept)

    def _predicted(self, teacher: Teacher, batch: Batch, hidden_PH: torch.Tensor, kept: Kept | None) -> Predicted:
        head = Head.from_module(self.model.get_output_embeddings(), kept)
        return teacher.target.predicted(_as_response(batch), hidden_PH, head, kept)


class Distillation(lightning.LightningModule):
    """Distillation of the frozen target into the drafter at every response token (paper, section 2.3).

    The loss is (1 - text_share) x the distillation loss over response tokens + text_share x the next-token loss over
    packed text. Each is a mean over the tokens of its kind, of all ranks, so that the proportion (9:1 in the paper)
    does not depend on the lengths of responses and text. The target's distributions come from the batch if they are
    cached, else from a forward pass of the target.

    Args:
        target: the frozen target, in eval mode. With a cache, its output embedding is sufficient.
        drafter: the trainable model.
        loss: (logits_p_NV, logits_q_NV) -> values (N,); see `drafter.losses`.
        text_share: the weight of the next-token loss.
        learning_rate: the largest of the schedule.
        optimization: the optimizer and the schedule.
        weighting: returns the weight of each response position; see `drafter.training.weighting`.
        num_speculative_tokens: gamma of the block efficiency that is logged; see `decoding.expected_efficiency`.
        response_top_p: the top_p with which the responses were generated.
        shard_target: whether an uncached target is sharded over the ranks of each node; see `models.sharding`.
        batch_tokens: the most tokens, with padding, of a forward pass of one rank; see `data.forward`.
        kept: the tokens that the drafter is to propose; None: all.
        sampled: the tokens that a step trains a drafter with that is to propose all; None: all.
        acceptance_rules: those for which the block efficiency is logged; see `decoding.acceptance`.
    """

    def __init__(
        self,
        target: PreTrainedModel | OutputEmbedding,
        drafter: PreTrainedModel,
        loss: Loss | Objective,
        text_share: float,
        learning_rate: float,
        optimization: Optimization = Optimization(),  # noqa: B008 (immutable)
        weighting: Weighting = uniform,
        num_speculative_tokens: int = 3,
        response_top_p: float = 1.0,
        shard_target: bool = False,
        batch_tokens: int | None = None,
        kept: Kept | None = None,
        sampled: SampledTokens | None = None,
        acceptance_rules: Sequence[str] = ("ratio",),
    ):
        super().__init__()
        check_drafter_head(drafter)
        self.drafter, self.text_share, self.weighting = drafter, text_share, weighting
        self.objective, self.batch_tokens = objective_of(loss), batch_tokens
        self.kept, self.sampled = kept, sampled
        self.learning_rate, self.optimization = learning_rate, optimization
        self.target = FrozenTarget(target, shard_target, batch_tokens)
        self._yardsticks = Yardsticks(num_speculative_tokens, response_top_p, acceptance_rules)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_module(self, self.drafter, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        self.target.prepare(self.device)
        place_tokens(self)

    on_validation_start = on_fit_start

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        mask_BT, text_BT = batch.target_mask_BT, batch.target_mask_BT & batch.is_text_B[:, None]
        kept = tokens_of_step(self)
        if kept is not None:
            text_BT = text_BT & kept.mask(next_tokens(batch))
        hidden_PH = hidden_at(self.drafter, batch, mask_BT, self.batch_tokens)
        predicted = self._predicted(batch, hidden_PH[response_mask(batch)[mask_BT]], kept)
        weights_N = self.weighting(predicted, batch)
        distilled = predicted.sum(with_batch_mean(self.objective, predicted, self.trainer), weights_N)
        text = next_token_sum(self.drafter, hidden_PH[text_BT[mask_BT]], next_tokens(batch)[text_BT], kept)
        loss = (1 - self.text_share) * distilled * self._per_weight(weights_N)
        loss = loss + self.text_share * text * self._per_weight(text_BT)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        hidden_NH = hidden_at(self.drafter, batch, response_mask(batch), self.batch_tokens)
        self._yardsticks.add(self._predicted(batch, hidden_NH, self.kept), batch)

    def on_validation_epoch_end(self) -> None:
        self._yardsticks.finish(self, trimmed=self.kept is not None)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        clip(optimizer, gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        return self.optimization.configure(self.drafter, self.learning_rate, steps)

    def _predicted(self, batch: Batch, hidden_NH: torch.Tensor, kept: Kept | None) -> Predicted:
        """Return the response positions of a batch, in the form that the losses take."""
        head = Head.from_module(self.drafter.get_output_embeddings(), kept)
        return self.target.predicted(batch, hidden_NH, head, kept)

    def _per_weight(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the factor that turns this rank's weighted sum into the weighted mean over all ranks.

        It includes world_size, by which DDP divides the gradients. Where all weights are zero it is arbitrary: the sum
        and its gradient are zero.
        """
        total = global_sum(weights, self.trainer)
        return self.trainer.world_size / torch.where(total > 0, total, 1.0)


def place_tokens(module: Pretraining | Distillation) -> None:
    """Move the tokens that a module is trained with to its device."""
    module.kept = None if module.kept is None else module.kept.to(module.device)
    module.sampled = None if module.sampled is None else module.sampled.to(module.device)


def tokens_of_step(module: Pretraining | Distillation) -> Kept | None:
    """Return the tokens whose logits the module's training step computes; None: all."""
    return module.kept if module.sampled is None else module.sampled.of_step(module.global_step)


def global_sum(values: torch.Tensor, trainer: lightning.Trainer) -> torch.Tensor:
    """Return the sum of the values of all ranks."""
    total: torch.Tensor = trainer.strategy.reduce(values.sum().float(), reduce_op="sum")
    return total


def with_batch_mean(objective: Objective, predicted: Predicted, trainer: lightning.Trainer) -> Objective:
    """Return a loss, with the mean over the positions of all ranks filled in if it needs one."""
    if objective.batch_mean is None:
        return objective
    values_N = predicted.values(objective.batch_mean)
    count = global_sum(torch.ones_like(values_N), trainer)
    return objective.with_mean(global_sum(values_N, trainer) / count)


def _as_response(batch: Batch) -> Batch:
    """Return a batch of packed text whose predicted tokens are distilled like those of a response."""
    return batch._replace(is_text_B=torch.zeros_like(batch.is_text_B))


def clip(optimizer: torch.optim.Optimizer, largest: float | None) -> None:
    """Scale the gradients so that their norm is at most `largest`.

    Lightning's own clipping refuses a fused optimizer in mixed precision because of the loss scaler, which bfloat16
    does not use.
    """
    if largest:
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], largest)


def check_precision(precision: str | int) -> None:
    """Raise if the trainer's precision needs loss scaling: `clip` would act on the scaled gradients.

    Raises:
        ValueError: the precision is a float16 one.
    """
    if str(precision) in ("16", "16-mixed", "16-true", "transformer-engine-float16"):
        raise ValueError(
            f"trainer.precision is {precision}: float16 needs loss scaling, which gradient clipping does not support "
            f"here. Give bf16-mixed, or 32-true"
        )
