"""Compare starts of a drafter at equal compute. Config: conf/starts.yaml.

A recipe is a start (conf/init) and the share of its operations that goes to pretraining; finetuning has the rest. Every
recipe is run with every seed and evaluated on the same prompts; text, responses and cache are those of the pipeline
under the same root. Finished stages are skipped, so that the same command continues after an interruption.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from drafter.artifacts.manifest import read_manifest, write_json
from experiments.pipeline import check, check_ranks, run
from experiments.planning.equal_compute import Planned, check_settings, check_starts, plan_recipes
from experiments.reporting.results import read_evaluations
from experiments.reporting.starts import Recipe, starts_table
from experiments.running.commands import pipeline_command
from experiments.running.jobs import Job, compose_job, evaluation_job
from experiments.running.progress import announce, quiet

log = logging.getLogger(__name__)


@pipeline_command("starts")
def main(settings: DictConfig) -> None:
    """Run every recipe with every seed, and write the table."""
    quiet()
    check_ranks(settings.ranks)
    others = list(settings.stage_overrides)
    check_settings(settings)
    check_starts(settings, others)
    planned = plan_recipes(settings, others)
    jobs = jobs_of(planned, settings, others)
    check(jobs)
    for one in planned:
        log.info("%s, seed %d: %d steps of pretraining, then %d of finetuning", one.name, one.seed, *steps_of(one))
    for number, job in enumerate(jobs, start=1):
        announce(job.stage, job.cfg.out, number, len(jobs))
        run(job, settings.ranks)
    if not jobs[-1].cfg.dry_run:
        write(planned, jobs[-1].cfg, settings)


def steps_of(planned: Planned) -> tuple[int, int]:
    """Return the steps of pretraining and of finetuning."""
    return planned.pretraining.cfg.pretrain.max_steps, planned.finetuning.cfg.finetune.max_steps


def jobs_of(planned: list[Planned], settings: DictConfig, others: list[str]) -> list[Job]:
    """Return every run in order: the data, the target's answers, the recipes, and their evaluation."""
    common = [compose_job(stage, others) for stage in ("prepare", "respond", "cache")]
    recipes = [job for one in planned for job in (one.pretraining, one.finetuning)]
    gammas = DictConfig({"num_speculative_tokens": [settings.num_speculative_tokens]})
    evaluation = evaluation_job([one.finetuning for one in planned], others, f"{settings.folder}/evaluate", gammas)
    return [*common, *recipes, evaluation]


def write(planned: list[Planned], cfg: DictConfig, settings: DictConfig) -> None:
    """Write the table of the recipes of this command, and the runs behind it."""
    recipes: dict[str, list[Recipe]] = {}
    runs: dict[str, Any] = {}
    for one in planned:
        stages = {"pretrain": one.pretraining.cfg.out, "finetune": one.finetuning.cfg.out}
        manifests = {stage: read_manifest(path, stage) for stage, path in stages.items()}
        runs |= {path: {**manifests[stage], "files": None, "config": None} for stage, path in stages.items()}
        seconds = sum(manifest["seconds"] for manifest in manifests.values())
        recipes.setdefault(one.name, []).append(Recipe(one.start, one.share, *steps_of(one), seconds))
    ours = {(one.name, one.seed) for one in planned}
    evaluations = [
        one
        for one in read_evaluations(Path(cfg.out), settings.base, cfg.evaluate.acceptance_rules[0])
        if (one.series, one.drafter.seed) in ours  # the folder may have other recipes and seeds
    ]
    table = starts_table(recipes, evaluations, settings.base, settings.num_speculative_tokens)
    for root in filter(None, (cfg.root, settings.publish)):
        folder = Path(root).expanduser() / settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        table.write(folder)
        write_json(folder / "runs.json", runs)
    print(f"\n### {table.title}\n\n{table.markdown()}\n\nwritten to {Path(cfg.root) / settings.folder / 'starts.md'}")


if __name__ == "__main__":
    main()
