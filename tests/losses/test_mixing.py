"""Weighted sums of losses: their values, and what they declare."""

from functools import partial

import pytest
import torch

from drafter.losses.block_losses import e2e_tvd
from drafter.losses.divergences import kld, nla, tvdpp
from drafter.losses.mixing import mix
from drafter.losses.objective import Objective, objective_of
from tests.objectives import LOSSES, positions

N, V = 12, 30


@pytest.fixture
def logits():
    """Return drafter and target logits in float64."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, V, dtype=torch.float64, generator=generator) for _ in range(2))


def test_a_mix_is_the_weighted_sum_of_its_parts(logits):
    p, q = logits
    parts = [partial(kld, temperature=1.0), partial(nla, temperature=0.3)]
    torch.testing.assert_close(mix(p, q, weights=[0.2, 3.0], parts=parts), 0.2 * parts[0](p, q) + 3 * parts[1](p, q))
    torch.testing.assert_close(LOSSES["kld_nla"](p, q), 0.5 * parts[0](p, q) + 0.5 * parts[1](p, q))
    ahead = mix(p, q, weights=[1.0, 1.0], parts=[kld, e2e_tvd], positions=positions(N, V))
    torch.testing.assert_close(ahead, kld(p, q) + e2e_tvd(p, q, positions=positions(N, V)))
    with pytest.raises(ValueError, match=r"loss.weights has 1 numbers for 2 loss.parts"):
        mix(p, q, weights=[1.0], parts=parts)


def test_a_mix_has_the_lookahead_and_the_batch_mean_of_its_parts():
    parts = [kld, partial(e2e_tvd, num_speculative_tokens=5)]
    assert objective_of(partial(mix, weights=[1, 1], parts=parts)).lookahead == 4
    assert objective_of(kld) == Objective(kld)
    assert objective_of(partial(mix, weights=[1, 1], parts=[kld, tvdpp])).batch_mean is not None
    assert objective_of(LOSSES["tvdpp position"]).batch_mean is None
    with pytest.raises(ValueError, match="several TVD"):
        objective_of(partial(mix, weights=[1, 1], parts=[tvdpp, tvdpp]))
