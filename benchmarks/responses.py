"""Compare generation in rounds with generation in one round: seconds for the same requests, alternating, in one run.

    python -m benchmarks.responses

It uses the embedded target and the instructions of `make prepare`. It measures process time, so that other work on the
machine matters less.
"""

import time

import torch

from drafter.artifacts.manifest import read_jsonl
from drafter.data.engines import Limits, Request, transformers_engine
from drafter.data.prompts import encode_prompt
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer

TARGET, DATA, COUNT, LENGTH, REPEATS = "assets/tiny-target", "runs/tiny/data", 256, 64, 3


def main() -> None:
    """Print one line per batch size and temperature."""
    torch.set_num_threads(1)
    tokenizer, target = load_tokenizer(TARGET), load_target(TARGET)
    rows = read_jsonl(f"{DATA}/instructions.jsonl")[:COUNT]
    limits = Limits(0.95, LENGTH, end_of_turn_ids(TARGET, tokenizer))
    for batch_tokens in (8192, 16384):
        for temperature in (0.0, 0.7):
            requests = [
                Request(row["id"], row["kind"], "train", temperature, encode_prompt(tokenizer, row["prompt"]))
                for row in rows
            ]
            seconds = {LENGTH: 0.0, 16: 0.0}
            for _ in range(REPEATS):
                for first_round in seconds:
                    engine = transformers_engine(target, limits, batch_tokens, first_round)
                    began = time.process_time()
                    engine(requests)
                    seconds[first_round] += time.process_time() - began
            print(
                f"{batch_tokens:5d} tokens per batch, temperature {temperature}: "
                f"one round {seconds[LENGTH] / REPEATS:.1f} s, "
                f"rounds {seconds[16] / REPEATS:.1f} s, ratio {seconds[LENGTH] / seconds[16]:.2f}"
            )


if __name__ == "__main__":
    main()
