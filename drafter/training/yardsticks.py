"""The measures that validation logs, the same for every loss, so that runs with different losses can be compared.

They are means over all positions of all ranks. If the drafter is trimmed (see `models.trimming`), they are those of the
drafter as it is served, whose other tokens have no probability, against the target's full distribution. Its KLD is
infinite then, and is not logged: `val/kld_kept` is the finite part that `losses.trimmed.Trimmed` defines, and
`val/kept_mass` is the target's probability of the kept tokens, which bounds the acceptance rate.

The block efficiency of sampled responses depends on the acceptance rule (see `decoding.acceptance`), and is logged for
each of the rules that are asked for; that of greedy responses is the same for all of them. A sparse target has no
distribution at other temperatures than 1, so above temperature 0 `ratio` is not logged. `argmax` and `match` need the
drafter's distribution and the response alone, and are exact with any target.

Shapes: N positions, R responses, M measures, A acceptance rules, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning
import torch

from drafter.data.batches import Batch, response_mask, responses_of
from drafter.decoding.acceptance import check_rules
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks, split_rows
from drafter.losses.chunked import Predicted, chunked_values
from drafter.losses.distributions import Target, most_likely, pair
from drafter.losses.trimmed import Trimmed
from drafter.warping import Sampling, double

MEANS = 5  # measures of which the mean is logged, before the acceptance probabilities


class Yardsticks:
    """Sums of the measures over the batches of a validation.

    Args:
        num_speculative_tokens: gamma of the block efficiency; see `decoding.expected_efficiency`. None: it is not
            measured, because the target did not generate the text.
        response_top_p: the top_p with which the responses were generated.
        rules: the acceptance rules for which the block efficiency is measured.

    Raises:
        ValueError: there is no rule, an unknown one or one twice.
    """

    def __init__(
        self,
        num_speculative_tokens: int | None = None,
        response_top_p: float = 1.0,
        rules: Sequence[str] = ("ratio",),
    ):
        self.num_speculative_tokens, self.response_top_p = num_speculative_tokens, response_top_p
        self.rules = check_rules(rules)
        self._sums: list[torch.Tensor] = []

    def add(self, predicted: Predicted, batch: Batch) -> None:
        """Measure the response positions of a batch of this rank."""
        rows_R, lengths_R = responses_of(response_mask(batch))
        temperature_R = batch.temperature_B[rows_R]
        temperature_N = temperature_R.repeat_interleave(lengths_R)

        def measures(logits_p_NV: torch.Tensor, rows: slice) -> torch.Tensor:
            target, tokens_N = predicted.target(rows), predicted.positions.tokens_N[rows]
            both = pair(logits_p_NV, target, temperature=1.0, top_p=1.0)
            kld_N, kept_N = both.kld(), torch.ones(len(logits_p_NV), device=logits_p_NV.device)
            if isinstance(target, Trimmed):
                kept_N = target.full().float().softmax(-1).index_select(-1, target.kept.ids_K).sum(-1)
                logits_p_NV, target = target.untrim(logits_p_NV), target.full()
                both = pair(logits_p_NV, target, temperature=1.0, top_p=1.0)
            agreement_N = (logits_p_NV.argmax(-1) == most_likely(target)).float()
            columns = [torch.ones_like(agreement_N), kld_N, both.tvd(), agreement_N, kept_N]
            del both
            if self.num_speculative_tokens is not None:
                columns += self._acceptance(logits_p_NV, target, tokens_N, temperature_N[rows]).unbind(-1)
            return torch.stack(columns, dim=-1)

        measured_NM = chunked_values(measures, predicted.hidden_NH, predicted.head, rows=predicted.chunk_rows())
        sums = [double(measured_NM[:, :MEANS]).sum(0)]
        if self.num_speculative_tokens is not None:
            blocks_AR = [
                expected_blocks(split_rows(accept_N, lengths_R), lengths_R, self.num_speculative_tokens)
                for accept_N in measured_NM[:, MEANS:].unbind(-1)
            ]
            selections = [
                (temperature_R == 0, blocks_AR[0]),
                *((temperature_R > 0, blocks_R) for blocks_R in blocks_AR),
            ]
            for selected_R, blocks_R in selections:
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
        names = ["greedy", *("sampled" if rule == "ratio" else f"sampled_{rule}" for rule in self.rules)]
        for name, tokens, blocks in zip(names, block_sums[::2], block_sums[1::2], strict=False):
            if tokens:
                module.log(f"val/block_efficiency_{name}", tokens / blocks, **shared)

    def _acceptance(
        self, logits_p_NV: torch.Tensor, target: Target, tokens_N: torch.Tensor, temperature_N: torch.Tensor
    ) -> torch.Tensor:
        """Return each response token's acceptance probabilities at its temperature, (N, A), NaN where unknown."""
        shape = (len(temperature_N), len(self.rules))
        accept_NA = torch.full(shape, math.nan, device=temperature_N.device, dtype=torch.float32)
        for millionths in temperature_N.unique().tolist():
            rows_N, sampling = temperature_N == millionths, Sampling(millionths / 1e6, self.response_top_p)
            q_NV = target[rows_N] if isinstance(target, torch.Tensor) else None
            for column, rule in enumerate(self.rules):
                if q_NV is not None or sampling.temperature == 0 or rule != "ratio":
                    accept_NA[rows_N, column] = acceptance_of_written(
                        logits_p_NV[rows_N], q_NV, tokens_N[rows_N], sampling, rule
                    )
        return accept_NA
