"""Tokens per second of our loop, transformers' assisted generation and autoregressive decoding, in one run.

    python -m benchmarks.decoding [--target DIR] [--drafter DIR] [--gamma 3] [--temperature 0] [--batch 8]

Run `make demo` first; the defaults are its target and its KLD drafter. Each prompt is decoded by every method in turn,
so that other load on the machine affects all alike. Assisted generation drafts the same number of tokens (a constant
schedule, no confidence threshold) and samples from the same distribution (top_k 0). Process time is that of one thread,
wall time that of the same run. The last row decodes a batch of sequences; when one ends, the next prompt takes its row.
"""

import argparse
import json
import time

import torch
from transformers import GenerationConfig

from drafter.data.conversations import opening
from drafter.data.prompts import encode_prompt
from drafter.decoding.decoders import Compiled
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode, speculative_decode_batch
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_target, load_tokenizer
from drafter.warping import Sampling


def methods(target, drafter, arguments, stops):
    """Return functions by name, each from prompts to the new tokens of each, and the one that decodes a batch."""
    gamma = arguments.gamma
    options = DecodingOptions(arguments.max_new_tokens, Sampling(arguments.temperature), stops)
    generator = torch.Generator().manual_seed(0)

    def autoregressive(prompts):
        return [autoregressive_decode(target, prompt, options, generator).tokens for prompt in prompts]

    def ours(prompts):
        return [speculative_decode(target, drafter, prompt, gamma, options, generator).tokens for prompt in prompts]

    def ours_batched(prompts):
        decoded = speculative_decode_batch(target, drafter, prompts, gamma, options, generator, arguments.batch)
        return [one.tokens for one in decoded]

    if isinstance(drafter, Compiled):
        return {"autoregressive, ours": autoregressive, "speculative, ours": ours}, ours_batched
    sampled = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0} if arguments.temperature else {}
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens, eos_token_id=stops, pad_token_id=0, **sampled)
    target.generation_config = GenerationConfig()  # `generate` fills the unset fields of `config` from it
    # `generate` reads the assistant's settings from the assistant's generation config.
    drafter.generation_config.num_assistant_tokens = gamma
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    drafter.generation_config.assistant_confidence_threshold = 0.0

    def generated(prompts, **more):
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **more)
            found.append(output[0, len(prompt) :].tolist())
        return found

    return {
        "autoregressive, ours": autoregressive,
        "autoregressive, transformers": generated,
        "speculative, ours": ours,
        "speculative, transformers": lambda prompts: generated(prompts, assistant_model=drafter),
    }, ours_batched


def main():
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="assets/tiny-target")
    parser.add_argument("--drafter", default="runs/tiny/finetune/kld-seed1")
    parser.add_argument("--tasks", default="runs/tiny/data/tasks.jsonl")
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="run our loop with compiled models as well")
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target, drafter = load_target(arguments.target), load_target(arguments.drafter)
    tokenizer = load_tokenizer(arguments.target)
    stops = end_of_turn_ids(arguments.target, tokenizer)
    with open(arguments.tasks) as file:
        rows = [json.loads(line) for line in file]
    prompts = [encode_prompt(tokenizer, opening(row)) for row in rows[:: max(1, len(rows) // arguments.prompts)]]
    prompts = prompts[: arguments.prompts]
    single, batched = methods(target, drafter, arguments, stops)
    if arguments.compile:
        longest = max(map(len, prompts)) + arguments.max_new_tokens + arguments.gamma + 1
        compiled, _ = methods(Compiled(target, longest), Compiled(drafter, longest), arguments, stops)
        single |= {f"{name}, compiled": compiled[name] for name in compiled if name.endswith("ours")}
    for method in (*single.values(), batched):
        method(prompts[:2])
    totals = {name: [0, 0.0, 0.0] for name in single}
    greedy_differences = dict.fromkeys(single, 0)
    for prompt in prompts:
        tokens = {name: timed(totals[name], method, [prompt]) for name, method in single.items()}
        for name in single:
            greedy_differences[name] += tokens[name] != tokens["autoregressive, ours"]
    size = f"batch of {arguments.batch}"
    totals |= {f"speculative, ours, {size}": [0, 0.0, 0.0]}
    alone = single["speculative, ours"](prompts) if arguments.temperature == 0 else None
    together = timed(totals[f"speculative, ours, {size}"], batched, prompts)
    print(f"{len(prompts)} prompts, gamma {arguments.gamma}, temperature {arguments.temperature}, one thread")
    base = totals["autoregressive, ours"]
    for name, (count, process, wall) in totals.items():
        ratio = (count / process) / (base[0] / base[1])
        rates = f"{count / process:7.1f} tokens/s of process time  {count / wall:7.1f} of wall time"
        print(f"{name:32s} {rates}  x{ratio:.2f}")
    if alone is not None:
        print(f"greedy outputs that differ from the autoregressive one: {greedy_differences}")
        print(
            "greedy outputs of the batch that differ from those one at a time: "
            f"{sum(a != b for a, b in zip(alone, together, strict=True))}"
        )


def timed(total, method, prompts):
    """Run a method, and add its tokens, process time and wall time to the total."""
    process, wall = time.process_time(), time.perf_counter()
    found = method(prompts)
    total[0] += sum(map(len, found))
    total[1] += time.process_time() - process
    total[2] += time.perf_counter() - wall
    return found


if __name__ == "__main__":
    main()
