"""Compare the gradient of TVD++ with that of TVD, and measure the variance of its sampled form.

    python -m benchmarks.tvdpp [ROOT]         after `make demo`; ROOT is runs/tiny

The gradient is with respect to the pretrained drafter's parameters, on responses spread over the distillation set. The
relative variance is the sum of the variances of all entries over the squared norm of the mean gradient, from
independent draws. "no baseline" is the plain reward: the gradient of the paper's Lemma by sampling.
"""

import sys
from functools import partial

import torch

from drafter.artifacts.rows import Rows
from drafter.data.batches import collate, next_tokens, response_sequence
from drafter.data.target_cache import restore, target_at
from drafter.losses.chunked import Head, Predicted
from drafter.losses.divergences import tvd, tvdpp
from drafter.losses.objective import Positions, objective_of
from drafter.models.inspection import hidden_states
from drafter.models.loading import load_model, load_target

ROWS, DRAWS = 64, 48


def reinforce(logits_p_NV, logits_q_NV, num_samples):
    """Return a loss whose gradient is that of the paper's Lemma, from samples of p with the plain reward."""
    log_p_NV, q_NV = logits_p_NV.log_softmax(-1), logits_q_NV.softmax(-1)
    tokens_NS = torch.multinomial(log_p_NV.detach().exp(), num_samples, replacement=True)
    reward_NS = (q_NV > log_p_NV.detach().exp()).float().gather(-1, tokens_NS)
    return (log_p_NV.gather(-1, tokens_NS) * -reward_NS).mean(-1)


def main(root):
    """Print two small tables."""
    target, drafter = load_target("assets/tiny-target"), load_model(f"{root}/drafter")
    rows = Rows(f"{root}/cache", "cache")
    chosen = range(0, len(rows), len(rows) // ROWS)
    batch = collate([response_sequence(row, restore(row, rows.schema)) for row in rows.read(chosen)])

    def gradient(loss):
        hidden_BTH = hidden_states(drafter, batch.input_ids_BT, batch.attention_mask_BT)
        mask_BT, head = batch.target_mask_BT, Head.from_module(drafter.get_output_embeddings())
        tokens_N = next_tokens(batch)[mask_BT]
        positions = Positions(tokens_N, torch.zeros_like(tokens_N))
        seen = Predicted(hidden_BTH[mask_BT], head, target_at(target, batch), positions)
        objective = objective_of(loss)
        if objective.batch_mean is not None:
            objective = objective.with_mean(seen.values(objective.batch_mean).mean())
        grads = torch.autograd.grad(seen.sum(objective) / len(tokens_N), list(drafter.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    torch.manual_seed(0)
    reference = gradient(tvd)
    print(f"{int(batch.target_mask_BT.sum())} positions of {len(chosen)} responses; |grad TVD| {reference.norm():.4f}")
    print("exact              cosine with TVD's gradient   norm / TVD's")
    for statistics in ("batch", "position"):
        ours = gradient(partial(tvdpp, statistics=statistics))
        cosine = torch.cosine_similarity(ours, reference, dim=0)
        print(f"  {statistics:16s} {cosine:10.6f} {ours.norm() / reference.norm():26.2f}")
    print("sampled            samples   cosine of the mean with TVD's   relative variance")
    for samples in (1, 8, 64):
        for name, loss in {
            "no baseline": partial(reinforce, num_samples=samples),
            "batch": partial(tvdpp, estimator="sampled", num_samples=samples),
            "position": partial(tvdpp, estimator="sampled", num_samples=samples, statistics="position"),
        }.items():
            draws = torch.stack([gradient(loss) for _ in range(DRAWS)])
            mean = draws.mean(0)
            # The norm of a mean of few draws contains noise, which is subtracted.
            noise = draws.var(0).sum()
            signal = (mean.square().sum() - noise / DRAWS).clamp_min(1e-12)
            cosine = torch.cosine_similarity(mean, reference, dim=0)
            print(f"  {name:16s} {samples:8d} {cosine:20.4f} {noise / signal:26.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
