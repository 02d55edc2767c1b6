"""The measures that validation logs, the same for every loss, so that runs with different losses can be compared.

They are means over all positions of all ranks. If the drafter is trimmed (see `models.trimming`), they are those of the
drafter as it is served, whose other tokens have no probability, against the target's full distribution. Its KLD is
infinite then, and is not logged: `val/kld_kept` is the finite part that `losses.trimmed.Trimmed` defines, and
`val/kept_mass` is the target's probability of the kept tokens, which bounds the acceptance rate.

Shapes: N positions, R responses, M measures, V vocabulary.
"""

import math
from typing import Any

import lightning
import torch

from drafter.data.batches import Batch, response_mask, responses_of
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks, split_rows
from drafter.losses.chunked import Predicted, chunked_values
from drafter.losses.distributions import Target, most_likely
from drafter.losses.divergences import kld, tvd
from drafter.losses.trimmed import Trimmed
from drafter.warping import Sampling, double


class Yardsticks:
    """Sums of the measures over the batches of a validation.

    Args:
        num_speculative_tokens: gamma of the block efficiency; see `decoding.expected_efficiency`. None: it is not
            measured, because the target did not generate the text.
        response_top_p: the top_p with which the responses were generated.
    """

    def __init__(self, num_speculative_tokens: int | None = None, response_top_p: float = 1.0):
        self.num_speculative_tokens, self.response_top_p = num_speculative_tokens, response_top_p
        self._sums: list[torch.Tensor] = []

    def add(self, predicted: Predicted, batch: Batch) -> None:
        """Measure the response positions of a batch of this rank."""
        rows_R, lengths_R = responses_of(response_mask(batch))
        temperature_R = batch.temperature_B[rows_R]
        temperature_N = temperature_R.repeat_interleave(lengths_R)

        def measures(logits_p_NV: torch.Tensor, rows: slice) -> torch.Tensor:
            target, tokens_N = predicted.target(rows), predicted.positions.tokens_N[rows]
            kld_N, kept_N = kld(logits_p_NV, target), torch.ones(len(logits_p_NV), device=logits_p_NV.device)
            if isinstance(target, Trimmed):
                kept_N = target.full().float().softmax(-1).index_select(-1, target.kept.ids_K).sum(-1)
                logits_p_NV, target = target.untrim(logits_p_NV), target.full()
            agreement_N = (logits_p_NV.argmax(-1) == most_likely(target)).float()
            accept_N = torch.full_like(agreement_N, math.nan)
            if self.num_speculative_tokens is not None:
                accept_N = self._acceptance(logits_p_NV, target, tokens_N, temperature_N[rows])
            columns = [torch.ones_like(agreement_N), kld_N, tvd(logits_p_NV, target), agreement_N, kept_N, accept_N]
            return torch.stack(columns, dim=-1)

        measured_NM = chunked_values(measures, predicted.hidden_NH, predicted.head, rows=predicted.chunk_rows())
        sums = [double(measured_NM[:, :-1]).sum(0)]
        if self.num_speculative_tokens is not None:
            accept_RL = split_rows(measured_NM[:, -1], lengths_R)
            blocks_R = expected_blocks(accept_RL, lengths_R, self.num_speculative_tokens)
            for selected_R in (temperature_R == 0, temperature_R > 0):
                known_R = selected_R & blocks_R.isfinite().to(selected_R.device)
                tokens, blocks = double(lengths_R[known_R].sum()), blocks_R[known_R.to(blocks_R.device)].sum()
                sums.append(torch.stack([tokens, blocks]))
        self._sums.append(torch.cat(sums))

    def finish(self, module: lightning.LightningModule, trimmed: bool) -> None:
        """Log the means over all ranks, and start anew.

        Raises:
            ValueError: the logits of drafter or target are not finite.
        """
        sums = module.trainer.strategy.reduce(torch.stack(self._sums).sum(0), reduce_op="sum")
        self._sums.clear()
        count, kld_sum, tvd_sum, agreement, kept, *block_sums = sums.tolist()
        if not math.isfinite(tvd_sum):
            raise ValueError(
                f"the total variation distance of drafter and target is {tvd_sum} after {module.trainer.global_step} "
                f"steps: the logits of one of them are not finite. Lower the learning rate, or try "
                f"target.dtype=float32"
            )
        # The sums already include all ranks. sync_dist averages equal values; without it Lightning warns.
        shared: dict[str, Any] = {"sync_dist": True}
        module.log("val/kld_kept" if trimmed else "val/kld", kld_sum / count, prog_bar=True, **shared)
        module.log("val/tvd", tvd_sum / count, **shared)
        module.log("val/acceptance_rate", 1 - tvd_sum / count, prog_bar=True, **shared)
        module.log("val/argmax_agreement", agreement / count, **shared)
        if trimmed:
            module.log("val/kept_mass", kept / count, **shared)
        for name, sums_of in (("greedy", block_sums[:2]), ("sampled", block_sums[2:])):
            if sums_of and sums_of[0]:
                module.log(f"val/block_efficiency_{name}", sums_of[0] / sums_of[1], **shared)

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
