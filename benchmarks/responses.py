"""Compare three ways to generate the same responses, alternating, in one run: tokens per second of process time.

    python -m benchmarks.responses                                        # the embedded target
    python -m benchmarks.responses --target DIRECTORY --prompts FILE      # another one; FILE has a `prompt` per row
    python -m benchmarks.responses --all-temperatures                     # four answers to each prompt

"rounds" is `engines.rounds_engine`, "side by side" is `engines.transformers_engine`, and "bare" only calls the target
with one token per sequence, as many side by side as fit, along the whole length of a response: no sampling, no prompts
and no finished sequences. Process time is divided by the number of threads, so other work on the machine matters less.
"""

import argparse
import time

import torch

from drafter.artifacts.manifest import read_jsonl
from drafter.data.engines import Limits, Request, rounds_engine, transformers_engine
from drafter.data.prompts import encode_prompt
from drafter.decoding.batched import RaggedDecoder
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer

TEMPERATURES = (0.0, 0.3, 0.7, 1.0)


def main() -> None:
    """Print the tokens per second of each way, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="assets/tiny-target")
    parser.add_argument("--prompts", default="runs/tiny/data/instructions.jsonl")
    parser.add_argument("--count", type=int, default=256, help="prompts")
    parser.add_argument("--all-temperatures", action="store_true", help="answer each prompt at each temperature")
    parser.add_argument("--without-rounds", action="store_true", help="leave out the slowest way")
    parser.add_argument("--length", type=int, default=64, help="the most tokens of a response")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer, target = load_tokenizer(asked.target), load_target(asked.target)
    prompts = sorted(
        (encode_prompt(tokenizer, row["prompt"]) for row in read_jsonl(asked.prompts)[: asked.count]), key=len
    )
    if asked.all_temperatures:
        prompts = [prompt for prompt in prompts for _ in TEMPERATURES]
    requests = [
        Request(str(number), "", "train", TEMPERATURES[number % len(TEMPERATURES)], prompt)
        for number, prompt in enumerate(prompts)
    ]
    limits = Limits(0.95, asked.length, end_of_turn_ids(asked.target, tokenizer))
    ways = {
        "rounds": lambda: sum(map(len, rounds_engine(target, limits, asked.batch_tokens)(requests))),
        "side by side": lambda: sum(map(len, transformers_engine(target, limits, asked.batch_tokens)(requests))),
        "bare": lambda: bare(target, prompts, asked.batch_tokens, asked.length),
    }
    if asked.without_rounds:
        del ways["rounds"]
    tokens, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for _ in range(asked.repeats):
        for name, generate in ways.items():
            began = time.process_time()
            tokens[name] += generate()
            seconds[name] += (time.process_time() - began) / asked.threads
    rates = {name: tokens[name] / seconds[name] for name in ways}
    mean = sum(map(len, prompts)) / len(prompts)
    print(f"{len(requests)} prompts of {mean:.0f} tokens, batches of {asked.batch_tokens} tokens")
    for name, rate in rates.items():
        ratios = (f"{rate / rates[other]:.2f} x {other}" for other in ("rounds", "bare") if other in rates)
        print(f"{name:12s} {rate:6.0f} tokens/s, {', '.join(ratios)}")


@torch.inference_mode()
def bare(target: torch.nn.Module, prompts: list[list[int]], batch_tokens: int, length: int) -> int:
    """Call the target with one token per sequence, and return the number of tokens."""
    middle = len(prompts[len(prompts) // 2])
    width, steps = max(1, min(len(prompts), batch_tokens // (middle + length))), min(32, length)
    decoder = RaggedDecoder(target, middle + length)
    for step in range(steps):
        decoder.forward([[1]] * width, [middle + step * length // steps] * width, 1)
    return width * steps


if __name__ == "__main__":
    main()
