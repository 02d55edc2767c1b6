"""Compute what a trimmed output embedding would gain at the shapes of the paper and of Llama 3.1 8B.

    python -m benchmarks.trimming [--tokenizer DIR --count TEXT… --cover TEXT…]

No weights are needed, since the parameters follow from the configs. tau = (1 − alpha^(γ+1)) / (1 − alpha), with alpha
from the paper's tau of 2.3 at γ = 3. Two columns bound the benefit of a smaller output embedding: the gain in MBSU if
no accepted draft is lost, and the share of alpha that may be lost before nothing is gained. With the Llama 2 tokenizer
and texts, the loss of the paper's drafter is estimated: the most used tokens are counted in some texts, and their
coverage is measured in others. Then alpha' = alpha · coverage, as if the lost tokens had been accepted as often as the
others.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from drafter.metrics import memory_bound_speedup
from drafter.models.initialization import build_drafter
from drafter.models.inspection import num_parameters
from drafter.models.loading import load_tokenizer
from drafter.models.trimming import most_used

PAPER_TAU, GAMMA = 2.3, 3
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
LLAMA2 = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32_000)
LLAMA3 = LlamaConfig(
    num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=128_256
)


def tau(alpha, gamma=GAMMA):
    """Return the tokens per target call if each draft is accepted with probability `alpha`."""
    return (1 - alpha ** (gamma + 1)) / (1 - alpha)


ALPHAS = np.linspace(0, 0.999, 100_000)
ALPHA = ALPHAS[np.argmin(abs(tau(ALPHAS) - PAPER_TAU))]


def table(name, drafter, config, coverage):
    """Print the gain for each size; `coverage` gives the share of tokens that a size covers, or None."""
    with torch.device("meta"):
        sizes = yaml.safe_load(Path(f"conf/drafter/{drafter}.yaml").read_text())
        small, target = build_drafter(sizes, config.vocab_size, {}), num_parameters(LlamaForCausalLM(config))
    whole = num_parameters(small)
    before = memory_bound_speedup(tau(ALPHA), whole / target, GAMMA)
    print(f"\n{name}, {drafter}: c = {whole / target:.3%}, alpha {ALPHA:.3f}, MBSU {before:.3f} with the whole head\n")
    print(
        "| tokens kept | c | gain, none lost | alpha to lose | covered | gain, lost as covered |\n" + "| --- " * 6 + "|"
    )
    for size in [size for size in SIZES if size < config.vocab_size]:
        ratio = (whole - (config.vocab_size - size) * small.config.hidden_size) / target
        speedup = partial(memory_bound_speedup, size_ratio=ratio, num_speculative_tokens=GAMMA)
        may_lose = 1 - ALPHAS[np.argmin(abs(speedup(tau(ALPHAS)) - before))] / ALPHA
        covered = coverage(size)
        then = f"{covered:.2%} | {speedup(tau(ALPHA * covered)) / before - 1:+.1%}" if covered else " | "
        print(f"| {size} | {ratio:.3%} | {speedup(tau(ALPHA)) / before - 1:+.1%} | {may_lose:.1%} | {then} |")


def coverage_of(arguments):
    """Return a function from a number of most used tokens in the texts --count to their share in the texts --cover."""
    if not arguments.tokenizer:
        return lambda size: None
    tokenizer = load_tokenizer(arguments.tokenizer)
    counted, covered = (
        np.concatenate([tokenizer(path.read_text(), add_special_tokens=False)["input_ids"] for path in paths])
        for paths in (arguments.count, arguments.cover)
    )
    print(f"counted in {len(counted):,} tokens, covered in {len(covered):,}")
    ranked = most_used([counted.tolist()], LLAMA2.vocab_size)
    return lambda size: float(np.isin(covered, ranked[:size]).mean())


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    for name in ("count", "cover"):
        parser.add_argument(f"--{name}", nargs="+", default=[], type=Path)
    arguments = parser.parse_args()
    if bool(arguments.tokenizer) != bool(arguments.count and arguments.cover):
        parser.error("--tokenizer, --count and --cover belong together")
    table("Llama 2 7B Chat", "llama2_115m", LLAMA2, coverage_of(arguments))
    table("Llama 3.1 8B Instruct", "llama3_140m", LLAMA3, lambda size: None)


if __name__ == "__main__":
    main()
