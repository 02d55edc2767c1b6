"""Plan recipes of equal compute: a start of a drafter, and the share of the operations that goes to its pretraining.

Finetuning has the rest. Steps are rounded, so a recipe takes the operations to within half a step of each stage.
Validation and the target's answers, which all recipes share, are not counted.
"""

from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig

from drafter.models.loading import meta_model
from experiments.planning.estimates import finetuning_operations, pretraining_operations
from experiments.planning.roofline import Shape
from experiments.running.composing import concerning, first_key
from experiments.running.inputs import target_source
from experiments.running.jobs import Job, check_overrides, compose_job
from experiments.running.starts import empty_drafter

# What a recipe sets itself; an override of it would be lost.
OURS = ("seed", "out", "name", "series", "init.steps", "pretrain.max_steps", "finetune.max_steps", "inputs.drafter")


class Planned(NamedTuple):
    """The runs of one recipe with one seed."""

    start: str
    share: float
    seed: int
    pretraining: Job
    finetuning: Job

    @property
    def name(self) -> str:
        """Return the recipe's name: the start, and the percentage of the operations that pretraining takes."""
        return recipe_name(self.start, self.share)


def recipe_name(start: str, share: float) -> str:
    """Return the name of a recipe, such as "projected-40"."""
    return f"{start}-{share * 100:.3g}"


def starts_of(settings: DictConfig) -> dict[str, list[str]]:
    """Return the overrides of each start that is not left out."""
    return {str(name): list(overrides) for name, overrides in settings.starts.items() if overrides is not None}


def check_settings(settings: DictConfig) -> None:
    """Check the settings of a table of starts, before anything is composed.

    Raises:
        ValueError: a setting is wrong; the error names it.
    """
    for name, overrides in settings.starts.items():
        if overrides is not None and not isinstance(overrides, ListConfig):
            raise ValueError(f"starts.{name} is '{overrides}', must be a list of overrides, such as [init=layers]")
    for key, is_right, what in (
        (
            "shares",
            lambda one: _is_number(one) and 0 <= one < 1,
            "numbers from 0 to less than 1: finetuning needs some",
        ),
        ("seeds", lambda one: type(one) is int and one >= 0, "whole numbers"),
    ):
        given = settings[key]
        if not isinstance(given, ListConfig) or not given:
            raise ValueError(f"{key} is {given}, must be a list of {what}")
        if wrong := [one for one in given if not is_right(one)]:
            raise ValueError(f"{key} has {wrong[0]!r}, must have {what}")
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError(f"seeds is {list(settings.seeds)}: one of them stands there twice")
    if settings.operations is not None and not (_is_number(settings.operations) and settings.operations > 0):
        raise ValueError(f"operations is {settings.operations}, must be a number above 0, or null")
    if type(settings.num_speculative_tokens) is not int or settings.num_speculative_tokens < 1:
        raise ValueError(f"num_speculative_tokens is {settings.num_speculative_tokens}, must be a whole number above 0")
    if not starts_of(settings):
        raise ValueError("starts has no start that is not null: give one or more")
    names = [recipe_name(start, share) for start in starts_of(settings) for share in settings.shares]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"shares is {list(settings.shares)}, which gives two recipes the name {twice[0]}")
    if settings.base not in names:
        raise ValueError(f"base is '{settings.base}', must be one of the recipes: {', '.join(names)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_starts(settings: DictConfig, others: list[str]) -> None:
    """Check the overrides of the starts and of the command line: each has to reach a run unchanged.

    Raises:
        ValueError: an override belongs neither to pretraining nor to finetuning, or is one that a recipe sets itself.
    """
    check_overrides(others, settings)
    for name, overrides in {"the command line": others, **starts_of(settings)}.items():
        where = name if name == "the command line" else f"starts.{name}"
        for given in overrides:
            key = given.lstrip("+~").partition("=")[0]
            if key in OURS:
                raise ValueError(f"{where} has '{given}', which every recipe sets itself")
            known = {*concerning("pretrain", [given]), *concerning("finetune", [given])}
            if where != name and given not in known:
                raise ValueError(
                    f"{where} has '{given}', but '{first_key(given)}' is a setting of neither pretrain nor finetune"
                )
        for name in ("kept_tokens", "sampled_tokens"):
            stages = [given for given in overrides if given.partition("=")[0].endswith(f".{name}")]
            numbers = {given.partition("=")[2] for given in stages}
            if stages and (len(stages) < 2 or len(numbers) > 1):
                raise ValueError(f"{where} has '{stages[0]}': give pretrain.{name} and finetune.{name} the same value")


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
    model = meta_model(target_source(pretraining.cfg))
    drafter, target = Shape.of(empty_drafter(pretraining.cfg, model)), Shape.of(model)
    return (
        pretraining_operations(pretraining.cfg, drafter, target),
        finetuning_operations(finetuning.cfg, drafter, target),
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
    return Planned(start, share, seed, pretraining, finetuning_job(settings, others, [*chosen, *second]))


def pretraining_job(others: list[str], overrides: list[str]) -> Job:
    """Compose a pretraining with those of the overrides that it knows."""
    return compose_job("pretrain", others, concerning("pretrain", overrides))


def finetuning_job(settings: DictConfig, others: list[str], overrides: list[str]) -> Job:
    """Compose a finetuning, with the loss of all recipes and those of the overrides that it knows."""
    return compose_job("finetune", others, [f"loss={settings.distillation_loss}", *concerning("finetune", overrides)])
