"""Compare the time and peak memory of loss and backward pass in chunks with those of the complete batch.

    python -m benchmarks.losses                                     every loss, at shapes for the CPU or the GPU
    python -m benchmarks.losses --losses kld --hidden 1024 4096     the widths of the paper's drafter and target
    python -m benchmarks.losses --kept 8192 --vocabulary 49152 --hidden 192 576 --losses text kld
    python -m benchmarks.losses --kept 8192 --sampled 1024 --vocabulary 49152 --hidden 96 576 --losses kld

With --kept, chunks of a whole output embedding are compared with chunks of one that is trimmed to so many tokens, as in
training with kept_tokens, and with the same where an exact cache has log Z, without and with a sample of so many other
tokens; `text` is the next-token loss of pretraining, which has no target.

All start from hidden states. Their repetitions alternate in one process; on a CPU the time is process time of one
thread, so that other work on the machine matters less. Memory is the peak above the inputs; on a CPU it is the
high-water mark of a separate process for each path. On a GPU with liger-kernel installed, its fused linear JSD is timed
too.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from drafter.data.batches import States
from drafter.data.target_cache import normalise
from drafter.losses.chunked import Head, Predicted, chunked_sum
from drafter.losses.objective import Positions, objective_of
from drafter.losses.trimmed import Kept, SampledTokens, Trimmed
from tests.objectives import LOSSES, positions

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def paths(arguments):
    """Return the names of the paths, of which the others are compared with the first."""
    trimmed = ("chunks", "trimmed", "log_z", "sampled") if arguments.sampled else ("chunks", "trimmed", "log_z")
    return trimmed if arguments.kept else ("whole", "chunks")


class Cached(NamedTuple):
    """The kept tokens without and with a sample, the target's output embedding, and what an exact cache has."""

    kept: Kept
    sampled: Kept | None
    head: Head
    states: States


def inputs(arguments):
    """Return positions whose logits are a few units, and what a trimmed drafter needs of the target (or None)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    parts = []
    for width in arguments.hidden:
        for rows in (arguments.positions, arguments.vocabulary):
            parts.append((torch.randn(rows, width, device=DEVICE) * width**-0.25).to(dtype))
    hidden_p, weight_p, hidden_q, weight_q = parts
    target = Head(weight_q)
    seen = Predicted(
        hidden_p.requires_grad_(),
        Head(weight_p.requires_grad_()),
        lambda rows: target(hidden_q[rows]),
        positions(arguments.positions, arguments.kept or arguments.vocabulary, 64),
    )
    seen = seen._replace(positions=Positions(*(part.to(DEVICE) for part in seen.positions)))
    if not arguments.kept:
        return seen, None
    columns = normalise(hidden_q, target.precise())
    log_z, top = (torch.from_numpy(columns[name]).to(DEVICE) for name in ("log_z", "top"))
    kept = Kept.from_ids(range(arguments.kept), arguments.vocabulary).to(DEVICE)
    sampled = SampledTokens(kept, arguments.sampled, seed=0).of_step(0) if arguments.sampled else None
    return seen, Cached(kept, sampled, target, States(hidden_q, log_z, top.long()))


def trim(seen, cached, path):
    """Return the same positions for a drafter that is trained with the kept (and sampled) tokens alone."""
    kept, states = cached.sampled if path == "sampled" else cached.kept, cached.states
    of_kept = None if path == "trimmed" else Head(cached.head.weight_VH.index_select(0, kept.ids_K))

    def target(rows):
        trimmed = Trimmed(lambda: seen.target(rows), kept)
        if of_kept is None:
            return trimmed
        log_q = of_kept(states.hidden_NH[rows]) - states.log_z_N[rows, None]
        return trimmed._replace(log_q=lambda: log_q, top_N=states.top_N[rows])

    return seen._replace(head=Head(seen.head.weight_VH.index_select(0, kept.rows)), target=target, kept=kept)


def text_loss(seen):
    """Return the sum of the next-token loss, over the positions whose tokens are kept."""
    tokens, hidden = seen.positions.tokens_N, seen.hidden_NH
    if seen.kept is not None:
        kept = seen.kept.mask(tokens)
        tokens, hidden = seen.kept.place_V[tokens[kept]], hidden[kept]

    def values(logits, rows):
        logits = logits.float() if seen.kept is None else seen.kept.outcomes(logits.float())
        return F.cross_entropy(logits, tokens[rows], reduction="none")

    return chunked_sum(values, hidden, seen.head)


def loss_sum(name, path, seen):
    """Return the sum of one loss over all positions."""
    if name == "text":
        return text_loss(seen)
    objective = objective_of(LOSSES[name])
    if path == "whole":
        logits_q = seen.target(slice(None))
        return objective(seen.head(seen.hidden_NH), logits_q, seen.positions).sum()
    if objective.batch_mean is not None:
        objective = objective.with_mean(seen.values(objective.batch_mean).mean())
    return seen.sum(objective)


def step(name, path, seen, cached=None):
    """Compute one loss and its backward pass, discard the gradients, and return the value."""
    total = loss_sum(name, path, seen if path in ("whole", "chunks") else trim(seen, cached, path))
    total.backward()
    value = total.item()
    seen.hidden_NH.grad = seen.head.weight_VH.grad = None
    return value


def clock():
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak(name, path, arguments):
    """Return the peak memory of one step above the inputs, in bytes."""
    seen, cached = inputs(arguments)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, path, seen, cached)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    step(name, path, seen, cached)
    return resident("VmHWM") - before


def resident(field):
    """Return this process's memory in bytes: VmRSS now, VmHWM at its peak (getrusage would count the parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def peak_alone(name, path):
    """Return `peak` as measured in a separate process."""
    command = [sys.executable, "-m", "benchmarks.losses", *sys.argv[1:], "--peak", name, path]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    """Print a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, nargs=2, default=(1024, 4096) if CUDA else (128, 256))
    parser.add_argument("--kept", type=int, help="tokens that a trimmed output embedding keeps")
    parser.add_argument("--sampled", type=int, help="others that are drawn in each step, beside the kept ones")
    parser.add_argument("--losses", nargs="*", default=list(LOSSES))
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not CUDA:
        torch.set_num_threads(1)
    if arguments.peak:
        name, path = arguments.peak
        print(json.dumps(peak(name, path, arguments)))
        return
    print(f"{arguments.positions} positions, {arguments.vocabulary} tokens, hidden {arguments.hidden}, {DEVICE}")
    (seen, cached), compared = inputs(arguments), paths(arguments)
    for name in arguments.losses:
        seconds = dict.fromkeys(compared, 0.0)
        for repetition in range(arguments.repeats + 1):
            for path in compared:
                began = clock()
                step(name, path, seen, cached)
                seconds[path] += (clock() - began) * (repetition > 0)  # the first one warms up
        peaks = {path: peak_alone(name, path) for path in compared}
        whole, before = peaks[compared[0]], seconds[compared[0]] / arguments.repeats
        for path in compared[1:]:
            after, chunks = seconds[path] / arguments.repeats, peaks[path]
            print(
                f"{name:18s} {path:7s} time {before:7.3f} -> {after:7.3f} s  x{after / before:.2f}"
                f"   peak {whole / 1e9:5.2f} -> {chunks / 1e9:5.2f} GB  1/{whole / chunks:.1f}",
                flush=True,
            )
    if CUDA:
        against_liger(seen, arguments)


def against_liger(seen, arguments):
    """Time this project's JSD in chunks against liger-kernel's fused linear JSD, if that is installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        print("liger-kernel is not installed: no comparison with it")
        return
    torch.manual_seed(0)
    theirs = LigerFusedLinearJSD(jsd_beta=0.5)
    width = arguments.hidden[1]
    hidden_q = torch.randn(arguments.positions, width, device=DEVICE, dtype=torch.bfloat16)
    weight_q = torch.randn(arguments.vocabulary, width, device=DEVICE, dtype=torch.bfloat16) * width**-0.5
    ours = seen._replace(target=lambda rows: hidden_q[rows] @ weight_q.T)

    def liger():
        theirs(seen.hidden_NH, seen.head.weight_VH, hidden_q, weight_q).backward()
        seen.hidden_NH.grad = seen.head.weight_VH.grad = None

    seconds = [0.0, 0.0]
    for repetition in range(arguments.repeats + 3):
        for place, call in enumerate((lambda: step("jsd", "chunks", ours), liger)):
            began = clock()
            call()
            seconds[place] += (clock() - began) * (repetition > 2)
    print(f"jsd against liger-kernel: ours / theirs x{seconds[0] / seconds[1]:.2f}")


if __name__ == "__main__":
    main()
