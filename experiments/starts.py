"""Compare starts of a drafter at equal compute: a start, pretraining, finetuning. Config: conf/starts.yaml.

A recipe is a start (conf/init) with a division of a number of operations between pretraining and finetuning. Every
recipe is run with every seed and evaluated on the same prompts; text, responses and cache are those of the pipeline
under the same root. Finished stages are skipped, so that the same command continues after an interruption.
"""

from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from drafter.artifacts.manifest import read_manifest, write_json, write_text
from drafter.models.loading import meta_model
from experiments.pipeline import check, run
from experiments.planning.estimates import finetuning_operations, pretraining_operations
from experiments.planning.roofline import Shape
from experiments.reporting.results import read_evaluations
from experiments.reporting.starts import Recipe, starts_table
from experiments.reporting.tabular import Table
from experiments.running.commands import pipeline_command
from experiments.running.composing import concerning
from experiments.running.inputs import target_source
from experiments.running.jobs import Job, check_overrides, compose_job, evaluation_job
from experiments.running.progress import announce, quiet
from experiments.running.starts import empty_drafter


class Planned(NamedTuple):
    """The runs of one recipe with one seed."""

    start: str
    share: float
    pretraining: Job
    finetuning: Job

    @property
    def name(self) -> str:
        """Return the recipe's name: the start, and the percentage of the operations that pretraining takes."""
        return recipe_name(self.start, self.share)


@pipeline_command("starts")
def main(settings: DictConfig) -> None:
    """Run every recipe with every seed, and write the table."""
    quiet()
    others = list(settings.stage_overrides)
    check_overrides(others, settings)
    check_settings(settings)
    planned = plan_recipes(settings, others)
    jobs = jobs_of(planned, settings, others)
    check(jobs)
    for number, job in enumerate(jobs, start=1):
        announce(job.stage, job.cfg.out, number, len(jobs))
        run(job, settings.evaluate_ranks)
    if not jobs[-1].cfg.dry_run:
        write(planned, jobs[-1].cfg, settings)


def check_settings(settings: DictConfig) -> None:
    """Check the starts, the shares and the base.

    Raises:
        ValueError: a setting is wrong; the error names it.
    """
    if wrong := [share for share in settings.shares if not 0 <= share < 1]:
        raise ValueError(f"shares has {wrong[0]}, must be from 0 to less than 1: finetuning needs a part of it")
    names = [recipe_name(start, share) for start in starts_of(settings) for share in settings.shares]
    if len(set(names)) < len(names):
        raise ValueError(f"shares is {list(settings.shares)}: two of them are the same percentage")
    if settings.base not in names:
        raise ValueError(
            f"base is '{settings.base}', must be one of the recipes: {', '.join(names) or 'there are none'}"
        )


def starts_of(settings: DictConfig) -> dict[str, list[str]]:
    """Return the overrides of each start that is not left out."""
    return {str(name): list(overrides) for name, overrides in settings.starts.items() if overrides is not None}


def recipe_name(start: str, share: float) -> str:
    """Return the name of a recipe, such as "projected-40"."""
    return f"{start}-{share * 100:.3g}"


def plan_recipes(settings: DictConfig, others: list[str]) -> list[Planned]:
    """Return the runs of every recipe with every seed, with as many steps as the operations allow.

    Raises:
        ValueError: the operations do not suffice for one step.
    """
    scale = compose_job("pretrain", others).cfg.scale
    first, second = step_operations(settings, others, ["init=scratch"])
    budget = settings.operations or scale.pretrain_steps * first + scale.finetune_steps * second
    per_step = {start: step_operations(settings, others, chosen) for start, chosen in starts_of(settings).items()}
    planned = []
    for seed in settings.seeds:
        for start, (first, second) in per_step.items():
            for share in settings.shares:
                steps = round(share * budget / first), round((1 - share) * budget / second)
                if not steps[1] or (share and not steps[0]):
                    name = recipe_name(start, share)
                    raise ValueError(
                        f"operations is {budget:.2g}, less than a step of {name}: raise it, or leave out {name}"
                    )
                planned.append(plan_recipe(settings, others, start, share, seed, steps))
    return planned


def step_operations(settings: DictConfig, others: list[str], chosen: list[str]) -> tuple[float, float]:
    """Return the operations of a step of pretraining and of a step of finetuning, with the overrides of a start."""
    pretraining, finetuning = pretraining_job(others, chosen), finetuning_job(settings, others, chosen)
    target = meta_model(target_source(pretraining.cfg))
    drafter = Shape.of(empty_drafter(pretraining.cfg, target))
    return (
        pretraining_operations(pretraining.cfg, drafter),
        finetuning_operations(finetuning.cfg, drafter, Shape.of(target)),
    )


def plan_recipe(
    settings: DictConfig, others: list[str], start: str, share: float, seed: int, steps: tuple[int, int]
) -> Planned:
    """Return the runs of one recipe with one seed; both validate at their beginning and their end."""
    chosen, name = starts_of(settings)[start], f"{recipe_name(start, share)}-seed{seed}"
    drafter, out = (f"${{root}}/{settings.folder}/{kind}/{name}" for kind in ("drafter", "finetune"))
    first = [f"seed={seed}", f"out={drafter}", f"init.steps={steps[0]}", f"pretrain.validate_every={max(1, steps[0])}"]
    second = [f"seed={seed}", f"out={out}", f"inputs.drafter={drafter}", f"series={recipe_name(start, share)}"]
    second += ["finetune.keep_every=0", f"finetune.max_steps={steps[1]}", f"finetune.validate_every={steps[1]}"]
    pretraining = pretraining_job(others, [*chosen, *first])
    return Planned(start, share, pretraining, finetuning_job(settings, others, [*chosen, *second]))


def pretraining_job(others: list[str], overrides: list[str]) -> Job:
    """Compose a pretraining with those of the overrides that it knows."""
    return compose_job("pretrain", others, concerning("pretrain", overrides))


def finetuning_job(settings: DictConfig, others: list[str], overrides: list[str]) -> Job:
    """Compose a finetuning, with the loss of all recipes and those of the overrides that it knows."""
    return compose_job("finetune", others, [f"loss={settings.loss}", *concerning("finetune", overrides)])


def jobs_of(planned: list[Planned], settings: DictConfig, others: list[str]) -> list[Job]:
    """Return every run in order: the data, the target's answers, the recipes, and their evaluation."""
    common = [compose_job(stage, others) for stage in ("prepare", "respond", "cache")]
    recipes = [job for one in planned for job in (one.pretraining, one.finetuning)]
    gammas = DictConfig({"num_speculative_tokens": [settings.num_speculative_tokens]})
    evaluation = evaluation_job([one.finetuning for one in planned], others, f"{settings.folder}/evaluate", gammas)
    return [*common, *recipes, evaluation]


def write(planned: list[Planned], cfg: DictConfig, settings: DictConfig) -> None:
    """Write the table of the finished recipes, and the commands of the runs behind it."""
    recipes: dict[str, list[Recipe]] = {}
    runs: dict[str, Any] = {}
    for one in planned:
        stages = {"pretrain": one.pretraining.cfg.out, "finetune": one.finetuning.cfg.out}
        manifests = {stage: read_manifest(path, stage) for stage, path in stages.items()}
        runs |= {path: {**manifests[stage], "files": None, "config": None} for stage, path in stages.items()}
        seconds = sum(manifest["seconds"] for manifest in manifests.values())
        steps = (one.pretraining.cfg.init.steps, one.finetuning.cfg.finetune.max_steps)
        recipes.setdefault(one.name, []).append(Recipe(one.start, one.share, *steps, seconds))
    evaluations = read_evaluations(Path(cfg.out), settings.base)
    table = starts_table(recipes, evaluations, settings.base, settings.num_speculative_tokens)
    written = Path(cfg.root) / settings.folder
    for folder in filter(None, (written, settings.publish and Path(settings.publish))):
        write_table(table, folder)
        write_json(folder / "runs.json", runs)
    print(f"\n### {table.title}\n\n{table.markdown()}\n\nwritten to {written / 'starts.md'}")


def write_table(table: Table, folder: Path) -> None:
    """Write a table as Markdown and as LaTeX."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{table.name}.md", f"### {table.title}\n\n{table.markdown()}\n")
    write_text(folder / f"{table.name}.tex", table.latex())


if __name__ == "__main__":
    main()
