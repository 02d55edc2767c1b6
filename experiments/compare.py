"""Compare drafters by expected block efficiency, without decoding. Config: conf/compare.yaml.

Every drafter is judged on the same responses of the target, which a cache has together with the target's distributions,
so that differences are paired. A forward pass of the drafter over a response gives its expected number of blocks for
every γ and acceptance rule (see drafter.decoding.expected_efficiency). It is the mean of what decoding would give on
this text. Drafters without a model, and their combinations with one, can be compared, too.

Each drafter has a directory of its own, so that a new drafter needs only its own forward passes.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from drafter.artifacts.manifest import ArtifactError, fingerprint, read_manifest, require, write_jsonl, write_text
from drafter.artifacts.rows import Rows
from drafter.data.target_cache import format_kind, require_output_embedding
from drafter.decoding.acceptance import check_rules
from drafter.decoding.drafting import models_of, with_models
from drafter.decoding.options import check_draft_length
from drafter.models.loading import context_length, load_output_embedding, load_target
from drafter.ranks import Ranks, deal, from_first, join, wait_for_all
from experiments.reporting.comparison import (
    check_alike,
    comparison_page,
    comparison_tables,
    describe_runs,
    kinds_page,
    read_compared,
)
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
    path_of,
)
from experiments.running.progress import Progress
from experiments.running.tasks import check_draft_lengths

log = logging.getLogger(__name__)
COUNTS = "counts.jsonl"


@command("compare")
def main(cfg: DictConfig) -> None:
    """Count the expected blocks of every drafter that has no counts yet, and write the tables of all."""
    if cfg.dry_run:
        return dry_run.show(cfg, "compare", check)
    check(cfg)
    out, cache = Path(cfg.out), cfg.inputs.cache
    directories = output_directories(out, find_drafters(list(cfg.drafters)))
    identities = {path: named_identity(path) for path in directories}  # refused before anything is counted
    target = target_fingerprint(cfg)
    require(cache, "target", read_manifest(cache, "cache")["inputs"]["target"], target)
    rows = Rows(cache, "cache")
    check_responses(cfg, rows)
    for path in directories:
        check_named(cfg, path)
    settings = {name: value for name, value in plain(cfg.compare).items() if name != "yardsticks"}
    settings["target_dtype"] = cfg.target.dtype
    inputs = {"cache": fingerprint(cache, "cache"), "target": target}
    check_alike(out, settings, inputs["cache"])
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
    count(cfg, rows, {path: stage.directory for path, stage in pending.items()}, ranks)
    wait_for_all()
    if ranks.first:
        judged_on = {"responses": int((rows.splits == "validation").sum()), "top_p": top_p_of(rows)}
        for path, stage in pending.items():
            made = {"drafter": path, "directory": str(path_of(path))}
            stage.finish(counts={**identities[path]._asdict(), **made, **judged_on})
        write(cfg, out)


def top_p_of(rows: Rows) -> float:
    """Return the top-p with which the responses of a cache were generated."""
    return float(rows.schema.metadata[b"top_p"])


def count(cfg: DictConfig, rows: Rows, directories: dict[str, Path], ranks: Ranks) -> None:
    """Write the counts of each drafter that has none. Each rank takes the next drafter when it is free."""
    todo = from_first([path for path, directory in directories.items() if not (directory / COUNTS).exists()])
    if not todo:
        return
    whole = any(exit_layer(model_of(path) or "") is not None for path in todo)
    target = (load_target if whole else load_output_embedding)(target_source(cfg)).to(ranks.device)
    require_output_embedding(cfg.inputs.cache, target.get_output_embeddings())
    how, number = plain(cfg.compare), int((rows.splits == "validation").sum())
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
                        how["num_speculative_tokens"],
                        how["acceptance_rules"],
                        top_p_of(rows),
                    )
                )
                report(index * number + len(found), len(todo) * number, found[-1][0]["tokens"])
            write_jsonl(directories[path] / COUNTS, [row for of_response in found for row in of_response])


def write(cfg: DictConfig, out: Path) -> None:
    """Write the page of all drafters that were compared in a directory, and publish it if that is asked for."""
    compared, yardsticks = read_compared(out), list(cfg.compare.yardsticks)
    names = dict.fromkeys(one.drafter.series for one in compared)
    if missing := [name for name in yardsticks if name not in names]:
        log.warning("compare.yardsticks has %s, of which no drafter was compared: there are %s", missing, [*names])
    tables = comparison_tables(compared, yardsticks)
    pages = {
        "compare.md": comparison_page(compared, tables),
        "by_kind.md": kinds_page(compared, yardsticks),
        "compare.tex": "\n".join(one.latex() for one in tables),
        "runs.json": describe_runs(out),
    }
    for folder in filter(None, (out, cfg.publish and Path(cfg.publish))):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            if text:
                write_text(folder / name, text)
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier comparison
    print(f"{pages['compare.md']}\nwritten to {out / 'compare.md'}")


def check(cfg: DictConfig) -> None:
    """Check the settings before a model is loaded."""
    how = plain(cfg.compare)
    check_rules(how["acceptance_rules"])
    check_draft_lengths(how["num_speculative_tokens"], "compare.num_speculative_tokens")
    for gamma in how["num_speculative_tokens"]:
        if type(gamma) is not int:
            raise ValueError(f"compare.num_speculative_tokens has {gamma}, must have whole numbers alone")
        check_draft_length(gamma)
    for name in cfg.drafters:
        parse(name)


def check_responses(cfg: DictConfig, rows: Rows) -> None:
    """Check that the cache has the target's own responses to validation instructions, and what the rules need of them.

    The rule `ratio` needs distributions at the temperature of the response, which a sparse cache has only at 1.

    Raises:
        ArtifactError: the cache has no validation response, or others than the target wrote its responses.
        ValueError: it is sparse; names the rules that need the response and the drafter alone.
    """
    cache = cfg.inputs.cache
    by = read_manifest(cache, "cache")["counts"].get("by", "target")  # an earlier version did not record it
    if by not in ("target", "log"):
        raise ArtifactError(
            f"{cache} has responses by the {by}, and the expected blocks are those of the target's own: give a cache "
            f"of these, such as that of distillation=judged, as inputs.cache"
        )
    if not (rows.splits == "validation").any():
        raise ArtifactError(
            f"{cache} has no responses to validation instructions, and drafters are trained on the others: make one "
            f"with distillation=judged, and give it as inputs.cache"
        )
    if "ratio" in cfg.compare.acceptance_rules and format_kind(cache) == "sparse":
        raise ValueError(
            f"inputs.cache is {cache}, which is sparse: give compare.acceptance_rules=[argmax,match], which "
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
