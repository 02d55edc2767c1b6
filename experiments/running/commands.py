"""Start and end a command: Hydra composes its config, and an error that the user can correct is one line."""

import contextlib
import dis
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from drafter.interruptions import Interrupted, catch_signals
from experiments.running.composing import gather_stage_overrides, missing_values, with_home
from experiments.running.progress import announce, quiet

PROJECT = Path(__file__).parents[2]
Stage = Callable[[DictConfig], Any]


def command(name: str) -> Callable[[Stage], Callable[..., Any]]:
    """Return a decorator that makes a function of a config a command: conf/<name>.yaml with overrides.

    Called without an argument, the command reads the command line. Called with a config, as the pipeline does, it runs
    with that config.
    """

    def decorate(stage: Stage) -> Callable[..., Any]:
        @functools.wraps(stage)
        def run_stage(cfg: DictConfig) -> Any:
            check_seed(cfg)
            return stage(with_home(cfg))

        @functools.wraps(stage)
        def announce_and_run(cfg: DictConfig) -> Any:
            announce(name, with_home(cfg).get("out"))
            return run_stage(cfg)

        run = under_hydra(name, announce_and_run)

        @functools.wraps(stage)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return run_stage(cfg)
            with exit_in_one_line(f"experiments.{name}"), use_arguments(replace_dry_run_flag(sys.argv[1:])):
                return run()

        return main

    return decorate


def pipeline_command(name: str) -> Callable[[Stage], Callable[..., Any]]:
    """Return a decorator like `command` for a config whose command line also takes the overrides of the stages.

    Hydra refuses keys that conf/<name>.yaml does not have. The overrides of stages are therefore gathered into its key
    `stage_overrides` before Hydra reads the command line, so that `--help`, `--cfg` and `--info` work as for any other
    command. The command can also be called with a list of overrides in place of the command line.
    """

    def decorate(stage: Stage) -> Callable[..., Any]:
        run = under_hydra(name, stage)

        @functools.wraps(stage)
        def main(overrides: list[str] | None = None) -> Any:
            if overrides is not None:
                with initialize_config_module("conf", version_base="1.3"):
                    return stage(compose(name, gather_stage_overrides(name, overrides)))
            with (
                exit_in_one_line(f"experiments.{name}"),
                use_arguments(gather_arguments(name, replace_dry_run_flag(sys.argv[1:]))),
            ):
                return run()

        return main

    return decorate


def under_hydra(name: str, stage: Stage) -> Callable[[], None]:
    """Return a function that composes the config by Hydra from the command line and runs a stage with it.

    Hydra prints an additional line about an error of its task. The error of a single run is therefore hidden from Hydra
    and raised afterwards; in a sweep, Hydra has to know which jobs fail.
    """
    problems: list[Exception] = []

    @functools.wraps(stage)
    def task(cfg: DictConfig) -> Any:
        quiet()
        try:
            return stage(cfg)
        except Exception as problem:
            if str(HydraConfig.get().mode).endswith("MULTIRUN"):
                raise
            problems.append(problem)

    run = hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(task)

    def main() -> None:
        problems.clear()
        run()
        if problems:
            raise problems[0]

    return main


def gather_arguments(name: str, given: list[str]) -> list[str]:
    """Return the arguments with the overrides of stages gathered; Hydra's flags and tab completion stay unchanged."""
    parsed = get_args_parser().parse_args(given)
    if parsed.shell_completion:
        return given
    with initialize_config_module("conf", version_base="1.3"):
        overrides = gather_stage_overrides(name, parsed.overrides)
    return [argument for argument in given if argument not in parsed.overrides] + overrides


def replace_dry_run_flag(given: list[str]) -> list[str]:
    """Return the arguments with dry_run=true in place of `--dry-run`, a flag that Hydra does not know."""
    return ["dry_run=true" if argument == "--dry-run" else argument for argument in given]


@contextlib.contextmanager
def use_arguments(given: list[str]) -> Iterator[None]:
    """Let Hydra read these arguments in place of those of the command line."""
    before = sys.argv
    sys.argv = [before[0], *given]
    try:
        yield
    finally:
        sys.argv = before


def check_seed(cfg: DictConfig) -> None:
    """Raise if a seed is not a whole number, such as '1' in quotation marks, or is outside the range of a generator.

    Raises:
        ValueError: names the seed and the allowed range.
    """
    seed = cfg.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}, must be a whole number from 0 to {2**32 - 1}, without quotation marks")


@contextlib.contextmanager
def exit_in_one_line(module: str) -> Iterator[None]:
    """Turn an interruption, or an error that the user can correct, into one line of output and an exit.

    Every other exception is a bug and keeps its traceback.

    Args:
        module: the command's module, for the line that says how to continue after an interruption, and for errors.
    """
    for stream in (sys.stdout, sys.stderr):  # independent of the locale; the bytes of a path may not be UTF-8
        with contextlib.suppress(AttributeError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    requested = os.environ.get("HYDRA_FULL_ERROR")
    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints the traceback and exits itself
        with catch_signals():
            yield
    except Interrupted as interruption:
        if int(os.environ.get("RANK", 0)) == 0:
            name = signal.Signals(interruption.number).name
            print(f"\n{name}: {interruption.kept}. Go on with: {command_line(module)}", file=sys.stderr)
        sys.exit(128 + interruption.number)
    except Exception as problem:
        if requested or not is_refusal(problem):
            raise
        sys.exit(f"error: {sentence_of(problem, module)}\n(HYDRA_FULL_ERROR=1 shows where it was raised)")
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ.update({"HYDRA_FULL_ERROR": requested} if requested else {})


def sentence_of(problem: Exception, module: str) -> str:
    """Return the sentence of an error that the user can correct. OmegaConf's of a missing value has no remedy."""
    key = problem.full_key if isinstance(problem, MissingMandatoryValue) else None
    return missing_values(module.rpartition(".")[2], [key]) if key else str(problem)


def command_line(module: str) -> str:
    """Return the command line of this process, ready to paste into a shell."""
    start = ["python", "-m"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}", "-m"]
    return shlex.join([*start, module, *sys.argv[1:]])


def is_refusal(problem: BaseException) -> bool:
    """Return whether an error is a message to the user: a `raise` of this project, or an error of Hydra about a config.

    Errors that occur within an expression, such as a division by zero or a missing key, are bugs.
    """
    if isinstance(problem, InstantiationException) and problem.__cause__:
        return is_refusal(problem.__cause__)
    if isinstance(problem, (HydraException, OmegaConfBaseException)):
        return True
    trace = problem.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None or trace.tb_lasti < 0:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and any(Path(code.co_filename).is_relative_to(PROJECT / name) for name in ("drafter", "experiments"))
