"""Estimate what the pipeline needs on given hardware, from its configs and a roofline model. Config: conf/plan.yaml.

The command prints the number of parameters, c, the expected speed-up, and for each stage its tokens, operations, memory
by part, disk and time. It refuses a plan that cannot fit and names the setting that would make it fit.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from drafter.artifacts.manifest import ArtifactError, read_manifest
from drafter.metrics import memory_bound_speedup
from drafter.models.loading import meta_model
from experiments.planning.advice import advise, check_hours
from experiments.planning.estimates import estimates
from experiments.planning.roofline import Shape
from experiments.planning.world import StageEstimate, World
from experiments.reporting.tabular import Table, number
from experiments.running.commands import pipeline_command
from experiments.running.inputs import plain, target_source
from experiments.running.jobs import Job, all_jobs
from experiments.running.progress import duration
from experiments.running.starts import empty_drafter


@pipeline_command("plan")
def main(settings: DictConfig) -> None:
    """Print the plan.

    Raises:
        ValueError: a stage cannot fit, or an override belongs to no stage.
    """
    check_hours(settings.plan.hours)
    if type(settings.plan.gpus) is not int or settings.plan.gpus < 1:
        raise ValueError(f"plan.gpus is {settings.plan.gpus}, must be a whole number above 0")
    jobs = all_jobs(settings)
    world = world_of(settings, jobs)
    finished = {id(job): job.stage for job in jobs if is_finished(job)}
    stages = [
        stage._replace(seconds=0.0) if id(job) in finished else stage for job in jobs for stage in estimates(job, world)
    ]
    print(plan_text(stages, world, settings, list(dict.fromkeys(finished.values()))))
    check_fits(stages, world, settings)
    print(advise(next(job.cfg for job in jobs if job.stage == "pretrain"), world, stages, settings.plan.hours))


def world_of(settings: DictConfig, jobs: list[Job]) -> World:
    """Return what all stages of the plan share, from the config of the first job."""
    cfg = jobs[0].cfg
    known: dict[str, Any] = plain(cfg.target_shape) if cfg.target_shape else {}
    shape = known if known.pop("of", None) == cfg.target.path else None
    target = meta_model(target_source(cfg), shape)
    drafter = empty_drafter(cfg, target)
    expected = cfg.scale.expected
    return World(
        settings.hardware,
        settings.plan.gpus,
        Shape.of(target),
        Shape.of(drafter),
        expected.prompt_tokens,
        expected.response_tokens,
        expected.block_efficiency,
        sum(job.stage == "finetune" for job in jobs),
        next(job.cfg.respond.states for job in jobs if job.stage == "respond"),
    )


def is_finished(job: Job) -> bool:
    """Return whether a stage's directory is complete. Whether it is so with these settings, the stage itself checks."""
    try:
        read_manifest(job.cfg.out, job.stage)
    except ArtifactError:
        return False
    return True


def active(shape: Shape) -> str:
    """Say how many parameters of a mixture of experts a token meets; nothing about another model."""
    return f" ({number(shape.active)} active per token)" if shape.routed else ""


def plan_text(stages: list[StageEstimate], world: World, settings: DictConfig, finished: Sequence[str] = ()) -> str:
    """Return the plan as Markdown. The stages that are finished, by name, take no time."""
    ratio, gammas = world.drafter.active / world.target.active, (3, 5)
    speedups = ", ".join(f"{memory_bound_speedup(world.block_efficiency, ratio, g):.2f} at γ = {g}" for g in gammas)
    head = (
        f"# Plan: {world.gpus} × {world.hardware.name}\n\n"
        f"Target {number(world.target.parameters)} parameters{active(world.target)}, "
        f"drafter {number(world.drafter.parameters)}{active(world.drafter)}: "
        f"c = {ratio:.2%}. With the block efficiency to expect, {world.block_efficiency}, the memory-bound speed-up is "
        f"{speedups}.\n"
    )
    if finished:
        head += f"\nFinished already, and without time in the table: {', '.join(finished)}.\n"
    price = settings.plan.price
    columns = ["stage", "runs", "tokens", "operations", "memory per device", "disk", "time", "device-hours"]
    columns += ["price"] if price else []
    lines, names = [], list(dict.fromkeys(stage.name for stage in stages))
    for name in [*names, "all"]:
        chosen = [stage for stage in stages if name in (stage.name, "all")]
        hours = sum(stage.seconds for stage in chosen) * world.gpus / 3600
        lines.append(
            [
                name,
                str(len(chosen)),
                number(sum(stage.tokens for stage in chosen)),
                f"{sum(stage.operations for stage in chosen):.1e}",
                format_bytes(max(stage.total_memory for stage in chosen)),
                format_bytes(sum(stage.disk for stage in chosen)),
                duration(sum(stage.seconds for stage in chosen)),
                f"{hours:,.2f}",
                *([f"{hours * price:,.2f}"] if price else []),
            ]
        )
    parts = list(dict.fromkeys(part for stage in stages for part in stage.memory))
    largest = [max((one for one in stages if one.name == name), key=lambda one: one.total_memory) for name in names]
    rows = [
        [one.name, *(format_bytes(one.memory[part]) if part in one.memory else "" for part in parts)] for one in largest
    ]
    memory = Table("memory", "Memory per device, by part", ["stage", *parts], rows)
    return f"{head}\n{Table('plan', 'Plan', columns, lines).markdown()}\n\n## {memory.title}\n\n{memory.markdown()}\n"


def check_fits(stages: list[StageEstimate], world: World, settings: DictConfig) -> None:
    """Check that every stage fits into the memory of a device, and all runs onto the disk.

    Raises:
        ValueError: something does not fit; the error names the stage, its largest part and the setting to change.
    """
    for stage in stages:
        if stage.total_memory > world.hardware.memory:
            part = max(stage.memory, key=lambda name: stage.memory[name])
            raise ValueError(
                f"{stage.name} takes {format_bytes(stage.total_memory)} on each device, "
                f"{format_bytes(stage.memory[part])} of it {part}, "
                f"and a {world.hardware.name} has {format_bytes(world.hardware.memory)}: {stage.remedy}"
            )
    disk, limit = sum(stage.disk for stage in stages), settings.plan.disk
    if limit and disk > limit:
        largest = max(stages, key=lambda stage: stage.disk)
        remedy = "cache=sparse" if largest.name == "cache" else "fewer runs or tokens"
        raise ValueError(
            f"the runs take {format_bytes(disk)} on disk, {format_bytes(largest.disk)} of it {largest.name}, "
            f"and plan.disk is {format_bytes(limit)}: {remedy}"
        )


def format_bytes(value: float) -> str:
    """Return a number of bytes with its unit: "13.5 GB"; "" for 0."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e3:.3g} kB" if value else ""


if __name__ == "__main__":
    main()
