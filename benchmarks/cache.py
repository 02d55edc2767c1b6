"""Measure the size and accuracy of each cache format against the live target, on the prepared responses.

    python -m benchmarks.cache [ROOT] [--target DIR]        after `make demo`; ROOT is runs/tiny, DIR its target
    python -m benchmarks.cache --throughput                 finetuning steps with each cache and with the live target

The default prints, for each format, the bytes per token in its files and the errors against the live distributions at
the same tokens: the relative error of the logits, the mean and the error of acceptance rate, TVD and KLD of the
pretrained drafter, and the cosine between the gradients of TVD and KLD with respect to the drafter's hidden states.
"top-k renormalised" is the distribution of a cache that keeps only the top k. Formats with samples are written DRAWS
times: "bias" is the error of the mean over these draws, with its standard error.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from drafter.artifacts import rows
from drafter.artifacts.rows import Rows
from drafter.artifacts.storage import Folder
from drafter.data.batches import collate, response_sequence
from drafter.data.target_cache import ExactFormat, SparseFormat, live_target, restore, target_at, write_cache
from drafter.losses.chunked import Head
from drafter.losses.distributions import Drawn
from drafter.losses.divergences import acceptance_rate, kld, tvd
from drafter.models.inspection import hidden_states
from drafter.models.loading import load_model, load_target
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Distillation
from drafter.training.samples import Mixture, PackedText, Responses
from tests.conftest import finished_rows

ROWS, DRAWS, STEPS, ROUNDS = 96, 8, 25, 4
FORMATS = {
    "exact, bfloat16": ExactFormat(),
    "exact, float32": ExactFormat("float32"),
    "sparse, k=32 m=40": SparseFormat(),
    "sparse, k=64 m=8": SparseFormat(64, 8),
    "sparse, k=16 m=8": SparseFormat(16, 8),
}
MEASURES = {"alpha": acceptance_rate, "TVD": tvd, "KLD": kld}


def written(target, responses, folder, format, seed):
    """Write a cache of the responses; return it and its bytes per token."""
    count, schema = write_cache(target, responses, Folder(folder), format, batch_tokens=4096, shard_size=64, seed=seed)
    files, _ = rows.finish(Folder(folder), count, schema)
    size = sum(size for name, size in Folder(folder).sizes().items() if name.endswith(".arrow"))
    return finished_rows(Folder(folder), files, "cache"), size / responses.response_tokens


def some_responses(responses, folder):
    """Write and return a set of at most ROWS responses, spread evenly over all."""
    chosen = responses.read(range(0, len(responses), -(-len(responses) // ROWS)))
    rows.write_shard(Folder(folder), 0, chosen, responses.schema, {})
    return finished_rows(Folder(folder), rows.finish(Folder(folder), 1, responses.schema)[0], "respond")


def measured(head, hidden_NH, target):
    """Return the means of alpha, TVD and KLD, and the gradients of TVD and KLD."""
    hidden_NH = hidden_NH.detach().requires_grad_()
    logits = head(hidden_NH)
    means = {name: measure(logits, target).mean() for name, measure in MEASURES.items()}
    grads = [torch.autograd.grad(means[name], hidden_NH, retain_graph=True)[0].flatten() for name in ("TVD", "KLD")]
    return {name: mean.item() for name, mean in means.items()}, grads


def renormalised(logits_NV, top_k):
    """Return as logits the distribution of a cache that keeps only the top k."""
    top = logits_NV.topk(top_k, dim=-1)
    return torch.full_like(logits_NV, -torch.inf).scatter(-1, top.indices, top.values)


def fidelity(target, drafter, responses):
    """Print one line per format."""
    with tempfile.TemporaryDirectory() as folder:
        some = some_responses(responses, f"{folder}/responses")
        batch = collate([response_sequence(row) for row in some])
        with torch.no_grad():
            hidden_NH = hidden_states(drafter, batch.input_ids_BT, batch.attention_mask_BT)[batch.target_mask_BT]
            logits_NV = live_target(target, batch, plain_head=True)[1](slice(None)).float()
        head = Head.from_module(drafter.get_output_embeddings())
        live, live_grads = measured(head, hidden_NH, logits_NV)
        vocabulary = logits_NV.shape[1]
        print(f"{len(some)} responses, {len(logits_NV)} tokens, vocabulary {vocabulary}, hidden {hidden_NH.shape[1]}")
        print("live               " + "  ".join(f"{name} {value:.4f}" for name, value in live.items()))
        for name, format in FORMATS.items():
            draws = 1 if isinstance(format, ExactFormat) else DRAWS
            found, cosines = [], []
            for seed in range(draws):
                cache, bytes_per_token = written(target, some, f"{folder}/{name}{seed}", format, seed)
                cached = collate([response_sequence(row, restore(row, cache.schema)) for row in cache])
                distribution = target_at(target, cached)(slice(None))
                means, grads = measured(head, hidden_NH, distribution)
                found.append(torch.tensor([means[measure] - live[measure] for measure in MEASURES]))
                cosines.append(
                    [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(grads, live_grads, strict=True)]
                )
            report(name, bytes_per_token, torch.stack(found), torch.tensor(cosines).mean(0))
            if draws == 1:
                assert isinstance(distribution, torch.Tensor)  # only exact formats are written once
                error = (distribution.float() - logits_NV).norm() / logits_NV.norm()
                print(f"{'':27}relative error of the logits {error:.5f}")
        for top_k in (16, 64):
            means, grads = measured(head, hidden_NH, renormalised(logits_NV, top_k))
            error = torch.tensor([[means[measure] - live[measure] for measure in MEASURES]])
            cosine = torch.tensor(
                [torch.cosine_similarity(a, b, dim=0) for a, b in zip(grads, live_grads, strict=True)]
            )
            report(f"top-{top_k} renormalised", 4 * top_k, error, cosine)
        rest = Drawn.from_logits(logits_NV, logits_NV.argmax(-1), 64, 1).log_rest_N.exp().mean()
        print(f"mass outside the top 64: {rest:.4f}")


def report(name, bytes_per_token, errors, cosines):
    """Print bytes per token, the bias of each measure with its standard error, and the cosines."""
    spread = errors.std(0) / len(errors) ** 0.5 if len(errors) > 1 else torch.zeros(errors.shape[1])
    biases = "  ".join(
        f"{measure} {bias:+.5f}" + (f" ± {error:.5f}" if len(errors) > 1 else "")
        for measure, bias, error in zip(MEASURES, errors.mean(0), spread, strict=True)
    )
    print(f"{name:27}{bytes_per_token:6.0f} B  bias: {biases}  cosine: TVD {cosines[0]:.4f}  KLD {cosines[1]:.4f}")


def throughput(target, root):
    """Print the samples per second of finetuning with each cache and the live target, alternating, in CPU time."""
    responses, text = Rows(f"{root}/responses", "respond"), PackedText(f"{root}/data/train.npy", 256)
    with tempfile.TemporaryDirectory() as folder:
        sets = {"live target": responses}
        for name in ("exact, bfloat16", "sparse, k=32 m=40"):
            sets[name], _ = written(target, responses, f"{folder}/{name}", FORMATS[name], 0)
        drafter = load_model(f"{root}/drafter")
        module = Distillation(target, drafter, kld, 0.1, 1e-4)
        module.trainer = type(
            "Alone",
            (),
            {"world_size": 1, "strategy": type("S", (), {"reduce": staticmethod(lambda x, reduce_op: x)})()},
        )()
        module.log = lambda *_, **__: None
        optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-5, fused=True)
        seconds, loading, samples = dict.fromkeys(sets, 0.0), dict.fromkeys(sets, 0.0), dict.fromkeys(sets, 0)
        loaders = {}
        for name, found in sets.items():
            data = SequenceData(Mixture(Responses(found, "train"), text, 0.1, 0), Responses(found, "validation"), 20, 0)
            loaders[name] = iter(data.train_dataloader())
        for _ in range(ROUNDS):
            for name, loader in loaders.items():
                for _ in range(STEPS):
                    began = time.process_time()
                    batch = next(loader)
                    loading[name] += time.process_time() - began
                    module.training_step(batch, 0).backward()
                    torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    seconds[name] += time.process_time() - began
                    samples[name] += len(batch.input_ids_BT)
    live = samples["live target"] / seconds["live target"]
    for name in sets:
        rate = samples[name] / seconds[name]
        print(f"{name:27}{rate:7.1f} samples/s  x{rate / live:.2f}  loading {100 * loading[name] / seconds[name]:.1f}%")


def main():
    """Read the arguments and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="runs/tiny")
    parser.add_argument("--target", default="assets/tiny-target")
    parser.add_argument("--throughput", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = load_target(arguments.target)
    if arguments.throughput:
        throughput(target, arguments.root)
    else:
        fidelity(target, load_model(f"{arguments.root}/drafter"), Rows(Path(arguments.root) / "responses", "respond"))


if __name__ == "__main__":
    main()
