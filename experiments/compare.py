"""Compare drafters by expected block efficiency, without decoding. Config: conf/compare.yaml.

Every drafter is judged on the same responses of the target, which a cache has together with the target's distributions,
so that differences are paired. A forward pass of the drafter over a response gives its expected number of blocks for
every γ and acceptance rule (see drafter.decoding.expected_efficiency). It is the mean of what decoding would give on
this text. Drafters without a model, and their combinations with one, can be compared, too.

Each drafter has a directory of its own, so that a new drafter needs only its own forward passes.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from drafter.artifacts.manifest import fingerprint, read_jsonl, read_manifest, require, write_jsonl, write_text
from drafter.artifacts.rows import Rows
from drafter.data.target_cache import format_kind, require_output_embedding
from drafter.decoding.acceptance import check_rules
from drafter.decoding.drafting import models_of, with_models
from drafter.decoding.options import check_draft_length
from drafter.models.loading import context_length, load_output_embedding, load_target
from drafter.ranks import Ranks, deal, from_first, join, wait_for_all
from experiments.reporting.comparison import comparison_page, comparison_tables, describe_runs, read_compared
from experiments.running import dry_run
from experiments.running.commands import command
from experiments.running.comparing import expected_counts, judged_responses
from experiments.running.composing import override
from experiments.running.drafters import find_drafters, output_directories
from experiments.running.inputs import claim, plain, target_fingerprint, target_source
from experiments.running.named_drafters import (
    check_named,
    exit_layer,
    fingerprint_of,
    load_named,
    model_of,
    named_identity,
    parse,
)
from experiments.running.progress import Progress

COUNTS = "counts.jsonl"


@command("compare")
def main(cfg: DictConfig) -> None:
    """Count the expected blocks of every drafter that has no counts yet, and write the tables of all."""
    if cfg.dry_run:
        return dry_run.show(cfg, "compare", check)
    check(cfg)
    out, cache = Path(cfg.out), cfg.inputs.cache
    directories = output_directories(out, find_drafters(list(cfg.drafters)))
    target = target_fingerprint(cfg)
    require(cache, "target", read_manifest(cache, "cache")["inputs"]["target"], target)
    check_distributions(cfg)
    for path in directories:
        check_named(cfg, path)
    settings = {name: value for name, value in plain(cfg.compare).items() if name != "yardsticks"}
    inputs = {"cache": fingerprint(cache, "cache"), "target": target}
    stages = {
        path: claim(
            cfg,
            "compare",
            settings,
            {**inputs, "drafter": fingerprint_of(path, target)},
            directory,
            (override("drafters", [path]),),
        )
        for path, directory in directories.items()
    }
    pending = {path: stage for path, stage in stages.items() if not stage.complete}
    ranks = join()
    count(cfg, {path: stage.directory for path, stage in pending.items()}, ranks)
    wait_for_all()
    if ranks.first:
        for path, stage in pending.items():
            responses = len(read_jsonl(stage.directory / COUNTS))
            stage.finish(counts={**named_identity(path)._asdict(), "drafter": path, "responses": responses})
        write(cfg, out)


def count(cfg: DictConfig, directories: dict[str, Path], ranks: Ranks) -> None:
    """Write the counts of each drafter that has none. Each rank takes the next drafter when it is free."""
    todo = from_first([path for path, directory in directories.items() if not (directory / COUNTS).exists()])
    if not todo:
        return
    whole = any(exit_layer(model_of(path) or "") is not None for path in todo)
    target = (load_target if whole else load_output_embedding)(target_source(cfg))
    require_output_embedding(cfg.inputs.cache, target.get_output_embeddings())
    rows, how = Rows(cfg.inputs.cache, "cache"), cfg.compare
    number = int((rows.splits == "validation").sum())
    with Progress("compare", "response", ranks.world_size) as report:
        for index, path_number in deal(list(range(len(todo))), ranks.world_size):
            path = todo[path_number]
            drafter = with_models(load_named(cfg, path, target), lambda model: model.to(ranks.device))
            for model in models_of(drafter):
                check_context(path, context_length(model), rows)
            found: list[list[dict[str, Any]]] = []
            for judged in judged_responses(rows):
                found.append(
                    expected_counts(
                        drafter,
                        target,
                        judged,
                        how.num_speculative_tokens,
                        how.acceptance_rules,
                        float(rows.schema.metadata[b"top_p"]),
                    )
                )
                report(index * number + len(found), len(todo) * number, found[-1][0]["tokens"])
            write_jsonl(directories[path] / COUNTS, [row for of_response in found for row in of_response])


def write(cfg: DictConfig, out: Path) -> None:
    """Write the page of all drafters that were compared in a directory, and publish it if that is asked for."""
    compared, yardsticks = read_compared(out), list(cfg.compare.yardsticks)
    page = comparison_page(compared, yardsticks)
    for folder in filter(None, (out, cfg.publish and Path(cfg.publish))):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "compare.md", page)
        write_text(folder / "compare.tex", "\n".join(one.latex() for one in comparison_tables(compared, yardsticks)))
        write_text(folder / "runs.json", describe_runs(out))
    print(f"{page}\nwritten to {out / 'compare.md'}")


def check(cfg: DictConfig) -> None:
    """Check the settings before a model is loaded."""
    how = cfg.compare
    check_rules(plain(how.acceptance_rules))
    if not how.num_speculative_tokens:
        raise ValueError("compare.num_speculative_tokens is empty, must have at least one γ")
    for gamma in how.num_speculative_tokens:
        if type(gamma) is not int:
            raise ValueError(f"compare.num_speculative_tokens has {gamma}, must have whole numbers alone")
        check_draft_length(gamma)
    for name in cfg.drafters:
        parse(name)


def check_distributions(cfg: DictConfig) -> None:
    """Refuse the rule `ratio` if the cache is sparse, and has no distribution at other temperatures than 1.

    Raises:
        ValueError: names the rules that need the response and the drafter alone.
    """
    if "ratio" in cfg.compare.acceptance_rules and format_kind(cfg.inputs.cache) == "sparse":
        raise ValueError(
            f"inputs.cache is {cfg.inputs.cache}, which is sparse: give compare.acceptance_rules=[argmax,match], which "
            f"need the drafter and the response alone, or a cache made with cache=exact"
        )


def check_context(path: str, context: int, rows: Rows) -> None:
    """Refuse a drafter whose context is shorter than a response with its prompt.

    Raises:
        ValueError: names the drafter and both lengths.
    """
    longest = int(rows.lengths[rows.splits == "validation"].max())
    if longest > context:
        raise ValueError(
            f"drafter '{path}' has a context of {context} tokens, and the longest response with its prompt has "
            f"{longest}: leave it out of `drafters`, or generate responses with a lower respond.max_new_tokens"
        )


if __name__ == "__main__":
    main()
