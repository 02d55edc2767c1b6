"""The two LightningModules: `Pretraining` (next-token loss) and `Distillation` (a loss against the target).

Shapes: B sequences, T tokens, P predicted positions of a batch, N of them in responses, V vocabulary, H hidden size.
"""

import math
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from drafter.data.batches import Batch, next_tokens, response_mask, responses_of
from drafter.data.forward import hidden_at
from drafter.data.target_cache import target_at
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks, split_rows
from drafter.losses.chunked import Head, Predicted, chunked_sum, chunked_values
from drafter.losses.distributions import Target, most_likely
from drafter.losses.divergences import kld, tvd
from drafter.losses.objective import Loss, Objective, Positions, objective_of
from drafter.models.inspection import check_drafter_head, has_plain_head, hidden_states
from drafter.models.loading import OutputEmbedding
from drafter.models.sharding import shard_frozen, shard_module
from drafter.training.optimizers import Optimization
from drafter.training.weighting import Weighting, uniform
from drafter.warping import Sampling, double


class Pretraining(lightning.LightningModule):
    """Next-token prediction from scratch (paper, section 2.1).

    Args:
        model: the trainable causal LM.
        learning_rate: the largest of the schedule.
        optimization: the optimizer and the schedule.
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float, optimization: Optimization = Optimization()):  # noqa: B008 (immutable)
        super().__init__()
        check_drafter_head(model)
        self.model, self.learning_rate, self.optimization = model, learning_rate, optimization

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_module(self, self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        loss = next_token_loss(self.model, batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        loss = next_token_loss(self.model, batch)
        count = int(batch.target_mask_BT.sum())
        self.log("val/loss", loss, prog_bar=True, batch_size=count, sync_dist=True)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        clip(optimizer, gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        return self.optimization.configure(self.model, self.learning_rate, steps)


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
    ):
        super().__init__()
        check_drafter_head(drafter)
        self.shard_target, self.batch_tokens = shard_target, batch_tokens
        self.num_speculative_tokens, self.response_top_p = num_speculative_tokens, response_top_p
        self.drafter, self.text_share, self.weighting = drafter, text_share, weighting
        self.objective = objective_of(loss)
        self.learning_rate, self.optimization = learning_rate, optimization
        # The tuple keeps the target from being a submodule: no checkpoint, optimizer or all-reduce includes it.
        self._frozen = (target,)
        self._target_has_plain_head = True  # determined in on_fit_start
        self._yardsticks: list[torch.Tensor] = []

    @property
    def target(self) -> PreTrainedModel | OutputEmbedding:
        """The frozen target."""
        return self._frozen[0]

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_module(self, self.drafter, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        is_full_model = isinstance(self.target, PreTrainedModel)
        if is_full_model and self.shard_target:
            shard_frozen(self.target, self.device)
        self.target.to(self.device)
        if is_full_model:
            self._target_has_plain_head = has_plain_head(self.target)

    on_validation_start = on_fit_start

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        mask_BT, text_BT = batch.target_mask_BT, batch.target_mask_BT & batch.is_text_B[:, None]
        hidden_PH = hidden_at(self.drafter, batch, mask_BT, self.batch_tokens)
        predicted = self._predicted(batch, hidden_PH[response_mask(batch)[mask_BT]])
        weights_N = self.weighting(predicted, batch)
        distilled = predicted.sum(self._with_batch_mean(predicted), weights_N)
        text = next_token_sum(self.drafter, hidden_PH[text_BT[mask_BT]], next_tokens(batch)[text_BT])
        loss = (1 - self.text_share) * distilled * self._per_weight(weights_N)
        loss = loss + self.text_share * text * self._per_weight(text_BT)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        hidden_NH = hidden_at(self.drafter, batch, response_mask(batch), self.batch_tokens)
        predicted = self._predicted(batch, hidden_NH)
        rows_R, lengths_R = responses_of(response_mask(batch))
        temperature_R = batch.temperature_B[rows_R]
        temperature_N = temperature_R.repeat_interleave(lengths_R)

        def measures(logits_p_NV: torch.Tensor, rows: slice) -> torch.Tensor:
            target, tokens_N = predicted.target(rows), predicted.positions.tokens_N[rows]
            agreement_N = (logits_p_NV.argmax(-1) == most_likely(target)).float()
            distances = (kld(logits_p_NV, target), tvd(logits_p_NV, target))
            accept_N = self._acceptance(logits_p_NV, target, tokens_N, temperature_N[rows])
            return torch.stack([torch.ones_like(agreement_N), *distances, agreement_N, accept_N], dim=-1)

        measured_NM = chunked_values(measures, predicted.hidden_NH, predicted.head)
        blocks_R = expected_blocks(split_rows(measured_NM[:, -1], lengths_R), lengths_R, self.num_speculative_tokens)
        sums = [double(measured_NM[:, :-1]).sum(0)]
        for selected_R in (temperature_R == 0, temperature_R > 0):
            known_R = selected_R & blocks_R.isfinite().to(selected_R.device)
            sums.append(torch.stack([double(lengths_R[known_R].sum()), blocks_R[known_R.to(blocks_R.device)].sum()]))
        self._yardsticks.append(torch.cat(sums))

    def _acceptance(
        self, logits_p_NV: torch.Tensor, target: Target, tokens_N: torch.Tensor, temperature_N: torch.Tensor
    ) -> torch.Tensor:
        """Return the acceptance probability of each response token at its temperature, NaN where it is unknown."""
        accept_N = torch.full(temperature_N.shape, math.nan, device=temperature_N.device, dtype=torch.float32)
        for millionths in temperature_N.unique().tolist():
            rows_N, temperature = temperature_N == millionths, millionths / 1e6
            # A sparse target is unknown at other temperatures. At temperature 0, the response has its argmax: q unused.
            if isinstance(target, torch.Tensor) or temperature == 0:
                q_NV = target[rows_N] if isinstance(target, torch.Tensor) else logits_p_NV[rows_N]
                sampling = Sampling(temperature, self.response_top_p)
                accept_N[rows_N] = acceptance_of_written(logits_p_NV[rows_N], q_NV, tokens_N[rows_N], sampling)
        return accept_N

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(torch.stack(self._yardsticks).sum(0), reduce_op="sum")
        self._yardsticks.clear()
        count, kld_sum, tvd_sum, agreement, *block_sums = sums.tolist()
        if not math.isfinite(tvd_sum):
            raise ValueError(
                f"the total variation distance of drafter and target is {tvd_sum} after {self.trainer.global_step} "
                f"steps: the logits of one of them are not finite. Lower finetune.learning_rate, or try "
                f"target.dtype=float32"
            )
        # The sums already include all ranks. sync_dist averages equal values; without it Lightning warns.
        self.log("val/kld", kld_sum / count, prog_bar=True, sync_dist=True)
        self.log("val/tvd", tvd_sum / count, sync_dist=True)
        self.log("val/acceptance_rate", 1 - tvd_sum / count, prog_bar=True, sync_dist=True)
        self.log("val/argmax_agreement", agreement / count, sync_dist=True)
        for name, tokens, blocks in (("greedy", *block_sums[:2]), ("sampled", *block_sums[2:])):
            if tokens:
                self.log(f"val/block_efficiency_{name}", tokens / blocks, sync_dist=True)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        clip(optimizer, gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        return self.optimization.configure(self.drafter, self.learning_rate, steps)

    def _predicted(self, batch: Batch, hidden_NH: torch.Tensor) -> Predicted:
        """Return the response positions of a batch, in the form that the losses take."""
        mask_BT = response_mask(batch)
        lengths_R = responses_of(mask_BT)[1]
        last_N = (lengths_R.cumsum(0) - 1).repeat_interleave(lengths_R)  # the last position of each one's response
        following_N = last_N - torch.arange(len(last_N), device=last_N.device)
        positions = Positions(next_tokens(batch)[mask_BT], following_N)
        head = Head.from_module(self.drafter.get_output_embeddings())
        target = target_at(self.target, batch, self._target_has_plain_head, self.batch_tokens)
        return Predicted(hidden_NH, head, target, positions)

    def _with_batch_mean(self, predicted: Predicted) -> Objective:
        """Return the loss, with the mean over the positions of all ranks filled in if it needs one."""
        if self.objective.batch_mean is None:
            return self.objective
        values_N = predicted.values(self.objective.batch_mean)
        count = self._global_sum(torch.ones_like(values_N))
        return self.objective.with_mean(self._global_sum(values_N) / count)

    def _per_weight(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the factor that turns this rank's weighted sum into the weighted mean over all ranks.

        It includes world_size, by which DDP divides the gradients. Where all weights are zero it is arbitrary: the sum
        and its gradient are zero.
        """
        total = self._global_sum(weights)
        return self.trainer.world_size / torch.where(total > 0, total, 1.0)

    def _global_sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.trainer.strategy.reduce(values.sum().float(), reduce_op="sum")


def next_token_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy in nats over the predicted positions."""
    hidden_BTH, mask_BT = hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT), batch.target_mask_BT
    return next_token_sum(model, hidden_BTH[mask_BT], next_tokens(batch)[mask_BT]) / mask_BT.sum()


def next_token_sum(model: PreTrainedModel, hidden_NH: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the next tokens in nats, summed over N positions."""

    def values(logits_nV: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.cross_entropy(logits_nV.float(), tokens_N[rows], reduction="none")

    return chunked_sum(values, hidden_NH, Head.from_module(model.get_output_embeddings()))


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
