"""The frozen target in training: where its distributions come from, and how they meet the drafter's.

Shapes: B sequences, T tokens, N predicted positions, R responses, V vocabulary, H hidden size.
"""

from collections.abc import Callable
from functools import cache

import torch
from transformers import PreTrainedModel

from drafter.data.batches import Batch, States, next_tokens, response_mask, responses_of
from drafter.data.target_cache import target_at
from drafter.losses.chunked import Head, Predicted
from drafter.losses.distributions import Target
from drafter.losses.objective import Positions
from drafter.losses.trimmed import Kept, Trimmed
from drafter.models.inspection import has_plain_head
from drafter.models.loading import OutputEmbedding
from drafter.models.sharding import shard_frozen


class FrozenTarget:
    """A target whose distributions come from the batch if they are cached there, else from a forward pass.

    It is no module, so that a LightningModule that has it as an attribute includes it in no checkpoint, optimizer or
    all-reduce.

    Args:
        model: the target, in eval mode. With a cache, its output embedding is sufficient.
        shard: whether a model is sharded over the ranks of each node; see `models.sharding`.
        batch_tokens: the most tokens, with padding, of a forward pass of one rank; see `data.forward`.
    """

    def __init__(self, model: PreTrainedModel | OutputEmbedding, shard: bool = False, batch_tokens: int | None = None):
        self.model, self.shard, self.batch_tokens = model, shard, batch_tokens
        self._has_plain_head = True  # determined in `prepare`

    def prepare(self, device: torch.device) -> None:
        """Move the target to a device, and shard it if it is to be sharded. To call it again changes nothing."""
        is_full_model = isinstance(self.model, PreTrainedModel)
        if is_full_model and self.shard:
            shard_frozen(self.model, device)
        self.model.to(device)
        if is_full_model:
            self._has_plain_head = has_plain_head(self.model)

    def predicted(self, batch: Batch, hidden_NH: torch.Tensor, head: Head, kept: Kept | None = None) -> Predicted:
        """Return the response positions of a batch, in the form that the losses take.

        Args:
            batch: the sequences.
            hidden_NH: the drafter's hidden states at the response positions.
            head: the drafter's output embedding, of `kept.rows` alone if some are left out.
            kept: the tokens that have outcomes of their own; None: all.
        """
        mask_BT = response_mask(batch)
        lengths_R = responses_of(mask_BT)[1]
        last_N = (lengths_R.cumsum(0) - 1).repeat_interleave(lengths_R)  # the last position of each one's response
        following_N = last_N - torch.arange(len(last_N), device=last_N.device)
        positions = Positions(next_tokens(batch)[mask_BT], following_N)
        target = target_at(self.model, batch, self._has_plain_head, self.batch_tokens)
        if kept is None:
            return Predicted(hidden_NH, head, target, positions)
        return Predicted(hidden_NH, head, self._trimmed(target, batch, kept), positions, kept)

    def _trimmed(self, target: Callable[[slice], Target], batch: Batch, kept: Kept) -> Callable[[slice], Trimmed]:
        """Return a function of the positions to the target's distributions over the outcomes of the kept tokens.

        If the batch has log Z, the logits of the other tokens are computed only for a loss or measure that needs them.
        """

        def full(rows: slice) -> torch.Tensor:
            logits = target(rows)
            if not isinstance(logits, torch.Tensor):
                raise ValueError("a sparse target has no distribution over the kept tokens: use an exact cache")
            return logits

        states = batch.cached_N
        # Training in bfloat16 rounds the floats of a batch: states and log Z do not belong together any more.
        hidden_NH, log_z_N, top_N = states if isinstance(states, States) else (None, None, None)
        if hidden_NH is None or log_z_N is None or top_N is None or log_z_N.dtype == torch.bfloat16:
            return lambda rows: Trimmed(cache(lambda: full(rows)), kept)
        head = Head.from_module(self.model.get_output_embeddings(), kept._replace(sampled_S=None)).precise()

        def log_q(rows: slice) -> torch.Tensor:
            with torch.autocast(hidden_NH.device.type, enabled=False):  # log Z is that of precise logits
                return head(hidden_NH[rows]).detach() - log_z_N[rows, None]

        return lambda rows: Trimmed(cache(lambda: full(rows)), kept, cache(lambda: log_q(rows)), top_N[rows])
