"""Compare the time and peak memory of loss and backward pass in chunks with those of the complete batch.

    python -m benchmarks.losses                                     every loss, at shapes for the CPU or the GPU
    python -m benchmarks.losses --losses kld --hidden 1024 4096     the widths of the paper's drafter and target
    python -m benchmarks.losses --kept 8192 --vocabulary 49152 --hidden 192 576 --losses text kld

With --kept, chunks of a whole output embedding are compared with chunks of one that is trimmed to so many tokens, as in
training with kept_tokens; `text` is the next-token loss of pretraining, which has no target.

Both start from hidden states. Their repetitions alternate in one process; on a CPU the time is process time of one
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

import torch
import torch.nn.functional as F

from drafter.losses.chunked import Head, Predicted, chunked_sum
from drafter.losses.distributions import Kept, Trimmed
from drafter.losses.objective import Positions, objective_of
from tests.objectives import LOSSES, positions

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def paths(arguments):
    """Return the names of the two paths that are compared."""
    return ("chunks", "trimmed") if arguments.kept else ("whole", "chunks")


def inputs(arguments):
    """Return hidden states and output embeddings of drafter and target that give logits of a few units."""
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
    return seen._replace(positions=Positions(*(part.to(DEVICE) for part in seen.positions)))


def trim(seen, kept):
    """Return the same positions for a drafter that proposes the kept tokens alone, which have the gradient's rows."""
    head = Head(seen.head.weight_VH.index_select(0, kept.ids_K))
    return seen._replace(head=head, target=lambda rows: Trimmed(seen.target(rows), kept), kept=kept)


def text_loss(seen):
    """Return the sum of the next-token loss, over the positions whose tokens are kept."""
    tokens, hidden = seen.positions.tokens_N, seen.hidden_NH
    if seen.kept is not None:
        kept = seen.kept.mask(tokens)
        tokens, hidden = seen.kept.place_V[tokens[kept]], hidden[kept]
    return chunked_sum(
        lambda logits, rows: F.cross_entropy(logits.float(), tokens[rows], reduction="none"), hidden, seen.head
    )


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


def step(name, path, seen, kept=None):
    """Compute one loss and its backward pass, discard the gradients, and return the value."""
    total = loss_sum(name, path, trim(seen, kept) if path == "trimmed" else seen)
    total.backward()
    value = total.item()
    seen.hidden_NH.grad = seen.head.weight_VH.grad = None
    return value


def kept_tokens(arguments):
    """Return the first tokens of the vocabulary, or None if all are kept."""
    return Kept.from_ids(range(arguments.kept), arguments.vocabulary).to(DEVICE) if arguments.kept else None


def clock():
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak(name, path, arguments):
    """Return the peak memory of one step above the inputs, in bytes."""
    seen, kept = inputs(arguments), kept_tokens(arguments)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, path, seen, kept)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    step(name, path, seen, kept)
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
    seen, kept, compared = inputs(arguments), kept_tokens(arguments), paths(arguments)
    for name in arguments.losses:
        seconds = dict.fromkeys(compared, 0.0)
        for repetition in range(arguments.repeats + 1):
            for path in compared:
                began = clock()
                step(name, path, seen, kept)
                seconds[path] += (clock() - began) * (repetition > 0)  # the first one warms up
        whole, chunks = (peak_alone(name, path) for path in compared)
        before, after = (seconds[path] / arguments.repeats for path in compared)
        print(
            f"{name:18s} time {before:7.3f} -> {after:7.3f} s  x{after / before:.2f}"
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
