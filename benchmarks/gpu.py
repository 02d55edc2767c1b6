"""Finetuning, responding and decoding on one GPU, with random weights in the paper's shapes, relative to its limits.

    python -m benchmarks.gpu                (an H100 or another GPU with 40 GB; about 5 minutes)
    python -m benchmarks.gpu --small        (tiny shapes: a check of the script itself, on any machine)
    python -m benchmarks.gpu --parts respond compiled      (only some of: finetune, respond, eager, compiled)

The limits are measured in the same run: a large bfloat16 product (operations per second) and a large copy (bytes per
second). Finetuning: the 115M drafter on sequences of 2,048 tokens of which half are response, TVD++, with an exact and
a sparse cache: tokens per second, and MFU, which counts the drafter's three passes alone. Respond: Llama 2 7B's shape
with a batch of responses, relative to reading the weights and the cache. Decoding: the same target with the drafter,
where each draft is accepted with a prescribed probability: each target call's logits are set to agree or not. MBSU
takes the measured c, the time of a drafter call over that of a target call.
"""

import argparse

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from drafter.data.batches import Batch, States
from drafter.data.engines import Limits, Request, rounds_engine
from drafter.decoding.capabilities import decoder_of
from drafter.decoding.clock import now
from drafter.decoding.decoders import Compiled, Decodable
from drafter.decoding.generation import Decoded
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.decoding.timings import measure_call_timings
from drafter.losses.distributions import Drawn, Sparse
from drafter.losses.divergences import tvdpp
from drafter.metrics import memory_bound_speedup
from drafter.models.initialization import build_drafter
from drafter.models.loading import OutputEmbedding
from drafter.training.modules import Distillation
from experiments.planning.roofline import Shape, operations

PARTS = ("finetune", "respond", "eager", "compiled")


def seconds(work, device, repeats=5):
    """Return the time of the fastest of several runs, after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        began = now(device)
        work()
        found.append(now(device) - began)
    return min(found)


def limits(device, dtype, size):
    """Return the operations per second of a product and the bytes per second of a copy."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / seconds(lambda: left @ right, device)
    source = torch.empty(size * size * 16, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source), device)
    return flops, bandwidth


class Silent:
    """A stub of the parts of Lightning's trainer that a training step uses, in one process."""

    world_size, global_step = 1, 0

    class strategy:
        """A stub of a strategy with one process."""

        @staticmethod
        def reduce(value, reduce_op):
            """Return the value: there is only one process."""
            return value


def finetuning(device, shapes, sparse):
    """Return tokens, scored positions and seconds of a training step, the drafter's shape, and peak memory in bytes."""
    length, sequences, hidden = shapes["length"], shapes["sequences"], shapes["target"].hidden_size
    with torch.device(device):
        drafter = build_drafter(shapes["drafter"], shapes["target"].vocab_size, {}).train()
        head = OutputEmbedding(torch.nn.Linear(hidden, shapes["target"].vocab_size, bias=False).to(shapes["dtype"]))
    module = Distillation(head.requires_grad_(False), drafter, tvdpp, 0.1, 1e-4)
    module._trainer, module.log = Silent(), lambda *_, **__: None
    ids = torch.randint(0, drafter.config.vocab_size, (sequences, length), device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, length // 2 : -1] = True
    count = int(mask.sum())
    hidden_NH = torch.randn(count, hidden, device=device, dtype=shapes["dtype"])
    written_N = ids.roll(-1, 1)[mask]
    cached: States | Sparse = States(hidden_NH)
    if sparse:
        parts = zip(hidden_NH.split(256), written_N.split(256), strict=True)
        cached = Drawn.cat(
            [Drawn.from_logits(head.embedding(part).float(), ids_N, 32, 40) for part, ids_N in parts]
        ).weighted()
    text = torch.zeros(sequences, dtype=torch.bool, device=device)
    batch = Batch(ids, torch.ones_like(ids), mask, text, torch.ones(sequences, device=device), cached)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4, fused=device.type == "cuda")
    if device.type == "cuda":
        drafter.base_model.compile()
        torch.cuda.reset_peak_memory_stats()

    def step():
        with torch.autocast(device.type, shapes["dtype"], enabled=device.type == "cuda"):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    took = seconds(step, device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return ids.numel(), count, took, Shape.of(drafter), peak


class Prescribed:
    """Sets the target's logits after each call such that a draft is the argmax with a prescribed probability."""

    def __init__(self, target, rate, device):
        decoder_of(target)  # this tries the model, which has to happen before its logits are changed
        self.rate, self.calls = rate, torch.zeros((), device=device)
        target.base_model.register_forward_pre_hook(self.before, with_kwargs=True)
        target.get_output_embeddings().register_forward_hook(self.after)

    def before(self, module, arguments, named):
        """Store the ids."""
        self.ids_BT = named["input_ids"] if "input_ids" in named else arguments[0]

    def after(self, module, arguments, logits):
        """Agree or not by a hash of the call's number and the position: a compiled call cannot draw random numbers."""
        kept = logits.shape[-2]
        drafted = self.ids_BT[0, -kept:].roll(-1)
        self.calls.add_(1)
        hashed = torch.sin(self.calls * 12.9898 + torch.arange(kept, device=logits.device) * 78.233) * 43758.5453
        wanted = torch.where(hashed.frac().abs() < self.rate, drafted, (drafted + 1) % logits.shape[-1])
        return logits.scatter(-1, wanted.view(*[1] * (logits.ndim - 2), kept, 1), 1e4)


def main():
    """Run every part and print its rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        parser.error("there is no GPU here: --small checks the script")
    with open("conf/drafter/llama2_115m.yaml") as file:
        drafter = yaml.safe_load(file)
    shapes = {
        "drafter": drafter,
        "target": LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
        "length": 2048,
        "sequences": 16,
        "dtype": torch.bfloat16,
        "answers": 64,
        "tokens": 128,
    }
    if arguments.small:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        shapes |= {
            "drafter": drafter | small | {"num_hidden_layers": 1, "num_key_value_heads": 2},
            "target": LlamaConfig(num_hidden_layers=2, vocab_size=512, **small | {"hidden_size": 64}),
            "length": 64,
            "sequences": 2,
            "dtype": torch.float32,
            "answers": 4,
            "tokens": 12,
        }
    flops, bandwidth = limits(device, shapes["dtype"], 256 if arguments.small else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {flops:.3g} operations/s, {bandwidth:.3g} bytes/s\n")
    for cache in ("exact", "sparse") if "finetune" in arguments.parts else ():
        tokens, scored, took, shape, peak = finetuning(device, shapes, cache == "sparse")
        used = 3 * operations(shape, tokens, shapes["length"] / 2, scored) / took
        print(
            f"finetune, {cache} cache: {tokens / took:,.0f} tokens/s, MFU {used / flops:.1%} of the measured product, "
            f"peak memory {peak / 1e9:.1f} GB"
        )
    with torch.device(device):
        torch.set_default_dtype(shapes["dtype"])
        target = LlamaForCausalLM(shapes["target"]).requires_grad_(False).eval()
        guesser = build_drafter(shapes["drafter"], shapes["target"].vocab_size, {}).requires_grad_(False).eval()
        torch.set_default_dtype(torch.float32)
    if "respond" in arguments.parts:
        responding(target, shapes, bandwidth, device)
    decoding(target, guesser, shapes, arguments, bandwidth, device)


def responding(target, shapes, bandwidth, device):
    """Time a batch of responses, relative to reading the weights and the cache of the tokens so far."""
    count, tokens, prompt = shapes["answers"], shapes["tokens"], list(range(16))
    engine = rounds_engine(target, Limits(0.95, tokens, []), 10**9, first_round=tokens)
    asked = [Request(str(number), "", "train", 1.0, prompt) for number in range(count)]
    took = seconds(lambda: engine(asked), device, repeats=2)
    shape, width = Shape.of(target), target.dtype.itemsize
    read = shape.parameters * width + count * (len(prompt) + tokens / 2) * shape.kv_width * width
    least = tokens * read / bandwidth
    print(f"respond, {count} answers: {count * tokens / took:,.0f} tokens/s, {least / took:.1%} of the bandwidth limit")


def decoding(target, drafter, shapes, arguments, bandwidth, device):
    """Time one sequence without a drafter, and with drafts that are accepted with the prescribed probability."""
    Prescribed(target, arguments.acceptance, device)
    prompt, tokens, gamma = list(range(16)), 4 * shapes["tokens"], arguments.gamma
    ways: dict[str, tuple[Decodable, Decodable]] = {}
    if "eager" in arguments.parts:
        ways["eager"] = (target, drafter)
    if "compiled" in arguments.parts and device.type == "cuda":
        capacity = len(prompt) + tokens + gamma + 1
        ways["compiled"] = (Compiled(target, capacity), Compiled(drafter, capacity))
    options = DecodingOptions(tokens)
    for name, (timed_target, timed_drafter) in ways.items():
        found: list[Decoded] = []

        def baseline(model=timed_target):
            autoregressive_decode(model, prompt, options)

        def drafting(model=timed_target, drafter=timed_drafter, found=found):
            found.append(speculative_decode(model, drafter, prompt, gamma, options))

        alone, drafted = (seconds(work, device, 2) for work in (baseline, drafting))
        calls = len(found[-1].blocks)
        timings = measure_call_timings(timed_target, timed_drafter, prompt, gamma)
        expected = memory_bound_speedup(tokens / calls, timings.ratio, gamma)
        least = Shape.of(target).parameters * target.dtype.itemsize / bandwidth
        print(
            f"decode, {name}: {tokens / alone:,.1f} tokens/s, {least / (alone / tokens):.1%} of the bandwidth limit; "
            f"x{alone / drafted:.2f} at tau {tokens / calls:.2f}, {alone / drafted / expected:.1%} of the MBSU of "
            f"{expected:.2f} at the measured c of {timings.ratio:.1%}; a call of {gamma + 1} tokens takes "
            f"{timings.verification(gamma):.2f} of one"
        )


if __name__ == "__main__":
    main()
