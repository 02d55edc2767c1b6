"""Expected block efficiency against block efficiency by decoding: their difference, and the time of each.

    python -m benchmarks.expected_efficiency [ROOT] [--drafter DIR]        after `make demo`; ROOT is runs/tiny

The target responds to the validation prompts DRAWS times. From these responses the drafter's expected block efficiency
is computed as at each validation: with one forward pass of the drafter, in batches, and the target's distributions from
a cache. Then the same prompts are decoded with the drafter as often. Seconds are process time of one thread, without
those of the responses and the cache, which a training run has anyway.
"""

import argparse
import tempfile
import time
from collections import Counter

import numpy as np
import torch

from drafter.artifacts.rows import Rows, finish, write_shard
from drafter.artifacts.storage import Folder
from drafter.data.batches import by_budget, collate, next_tokens, response_sequence
from drafter.data.dialogues import Answered, Turn, rows_of
from drafter.data.engines import Limits, Request, transformers_engine
from drafter.data.responses import schema
from drafter.data.target_cache import ExactFormat, restore, target_at, write_cache
from drafter.decoding.expected_efficiency import acceptance_of_written, expected_blocks, split_rows
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import speculative_decode
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.inspection import hidden_states
from drafter.models.loading import load_target, load_tokenizer
from drafter.warping import Sampling
from tests.conftest import finished_rows

TARGET, PROMPTS, DRAWS, LENGTH = "assets/tiny-target", 100, {0.0: 1, 0.7: 6, 1.0: 6}, 64


def exact(logits_NV):
    """Return the logits that an exact cache gives, which are never drawn tokens."""
    assert isinstance(logits_NV, torch.Tensor)
    return logits_NV


@torch.inference_mode()
def count_expected_blocks(target, drafter, cache, sampling, gamma):
    """Return the tokens and the expected blocks of each response."""
    tokens, blocks = np.zeros(len(cache)), np.zeros(len(cache))
    for batch in by_budget(cache.lengths.tolist(), 4096):
        sequences = collate([response_sequence(row, restore(row, cache.schema)) for row in cache.read(batch)])
        mask = sequences.target_mask_BT
        hidden, head = (
            hidden_states(drafter, sequences.input_ids_BT, sequences.attention_mask_BT)[mask],
            drafter.lm_head,
        )
        generated, lengths, q = next_tokens(sequences)[mask], mask.sum(1), target_at(target, sequences)
        parts = [slice(start, start + 256) for start in range(0, len(generated), 256)]
        accept = torch.cat([acceptance_of_written(head(hidden[n]), exact(q(n)), generated[n], sampling) for n in parts])
        tokens[batch] = lengths
        blocks[batch] = expected_blocks(split_rows(accept, lengths), lengths, gamma)
    return tokens, blocks


def cached(target, requests, answers, folder):
    """Return the responses with a cache of the target's distributions."""
    generated = [
        row
        for number, (request, tokens) in enumerate(zip(requests, answers, strict=True))
        for row in rows_of(
            Answered(request._replace(id=str(number)), [Turn(request.prompt_ids, tokens)], None, Counter()), []
        )
    ]
    responses = Folder(f"{folder}/responses")
    write_shard(responses, 0, generated, schema(0.95), {})
    rows = finished_rows(responses, finish(responses, 1, schema(0.95))[0], "respond")
    count, columns = write_cache(target, rows, Folder(folder), ExactFormat(), batch_tokens=4096, shard_size=256, seed=0)
    return finished_rows(Folder(folder), finish(Folder(folder), count, columns)[0], "cache")


def ratio(tokens, blocks):
    """Return block efficiency and its standard error over responses."""
    value = tokens.sum() / blocks.sum()
    return value, np.std(tokens - value * blocks) * len(tokens) ** 0.5 / blocks.sum()


def main():
    """Print a line per temperature and gamma."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="runs/tiny")
    parser.add_argument("--drafter", default="runs/tiny/finetune/kld-seed1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target, drafter = load_target(TARGET), load_target(arguments.drafter)
    stops = end_of_turn_ids(TARGET, load_tokenizer(TARGET))
    responses = Rows(f"{arguments.root}/responses", "respond")
    held_out = [i for i, split in enumerate(responses.splits) if split == "validation"][:PROMPTS]
    prompts = [row["prompt_ids"].tolist() for row in responses.read(held_out)]
    for temperature, draws in DRAWS.items():
        sampling, generator = Sampling(temperature, 0.95), torch.Generator().manual_seed(0)
        options = DecodingOptions(LENGTH, sampling, stops)
        torch.manual_seed(0)
        engine = transformers_engine(target, Limits(0.95, LENGTH, stops), 16_384)
        requests = [Request("", "", "validation", temperature, prompt) for prompt in prompts * draws]
        cache = cached(target, requests, engine(requests), tempfile.mkdtemp())
        for gamma in (3, 5):
            began = time.process_time()
            expected = ratio(*count_expected_blocks(target, drafter, cache, sampling, gamma))
            cheap = time.process_time() - began
            began = time.process_time()
            decoded = [
                speculative_decode(target, drafter, prompt, gamma, options, generator) for prompt in prompts * draws
            ]
            dear = time.process_time() - began
            counts = np.array([(len(one.tokens), len(one.blocks)) for one in decoded], dtype=float)
            measured = ratio(*counts.T)
            print(
                f"temperature {temperature}, gamma {gamma}: expected {expected[0]:.3f} ± {expected[1]:.3f}, "
                f"decoded {measured[0]:.3f} ± {measured[1]:.3f}: {100 * (expected[0] / measured[0] - 1):+.1f}%; "
                f"{cheap:.1f} s against {dear:.1f} s, 1/{dear / cheap:.0f}"
            )


if __name__ == "__main__":
    main()
