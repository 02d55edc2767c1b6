"""What trimming the head would do at the paper's shape, computed: 115M drafter, Llama 2 7B Chat, 32,000 tokens.

    python -m benchmarks.trimming --tokenizer DIR --count TEXT… --cover TEXT…

The most used tokens are counted in some texts, and what they cover is measured in others. The acceptance rate is taken
to fall in proportion to what is not covered: alpha' = alpha · coverage, as if every token that the head lost had been
accepted at the mean rate. tau = (1 − alpha^(γ+1)) / (1 − alpha), with alpha from the paper's tau of 2.3 at γ = 3. No
weights are needed: the parameters are those of the two configs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from drafter.metrics import memory_bound_speedup
from drafter.models import build_drafter, load_tokenizer, num_parameters
from drafter.trimming import most_used

PAPER_TAU, SIZES = 2.3, (1024, 2048, 4096, 8192, 16384, 32000)


def tau(alpha, gamma):
    """Tokens per target call where each draft is accepted with the same chance."""
    return (1 - alpha ** (gamma + 1)) / (1 - alpha)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    for name in ("count", "cover"):
        parser.add_argument(f"--{name}", nargs="+", required=True, type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    counted, covered = (
        np.concatenate([tokenizer(path.read_text(), add_special_tokens=False)["input_ids"] for path in paths])
        for paths in (arguments.count, arguments.cover)
    )
    with torch.device("meta"):
        drafter = build_drafter(yaml.safe_load(Path("conf/drafter/llama2_115m.yaml").read_text()), 32_000, {})
        target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008))
    whole, width = num_parameters(drafter), drafter.config.hidden_size
    alpha = min(np.linspace(0, 0.99, 10_000), key=lambda chance: abs(tau(chance, 3) - PAPER_TAU))
    ranked = most_used([counted.tolist()], 32_000)
    print(f"counted in {len(counted):,} tokens, covered in {len(covered):,}; α = {alpha:.3f}\n")
    print(
        "| tokens kept | covered | c | MBSU, γ = 3 | against whole | MBSU, γ = 5 | against whole |\n"
        + "| --- " * 7
        + "|"
    )
    rows = []
    for size in SIZES:
        coverage = float(np.isin(covered, ranked[:size]).mean())
        ratio = (whole - (32_000 - size) * width) / num_parameters(target)
        rows.append(
            (size, coverage, ratio, *(memory_bound_speedup(tau(alpha * coverage, g), ratio, g) for g in (3, 5)))
        )
    for size, coverage, ratio, *speedups in rows:
        cells = [f"{value:.3f} | {value / base - 1:+.1%}" for value, base in zip(speedups, rows[-1][3:], strict=True)]
        print(f"| {size} | {coverage:.2%} | {ratio:.3%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
