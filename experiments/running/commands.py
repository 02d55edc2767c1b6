"""How a command begins and ends: paths in full at its start; at its end one line, where one line says all."""

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
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from drafter.interruptions import Interrupted, caught
from experiments.running.composing import with_home

OURS = Path(__file__).parents[2]
Stage = Callable[[DictConfig], Any]


def command(name: str) -> Callable[[Stage], Callable[..., Any]]:
    """Make a command of a function of a config: conf/<name>.yaml and the command line's overrides.

    Called with a config, as the pipeline does, the function runs with that.
    """

    def decorate(stage: Stage) -> Callable[..., Any]:
        @functools.wraps(stage)
        def entered(cfg: DictConfig) -> Any:
            check_seed(cfg)
            return stage(with_home(cfg))

        run = hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(entered)

        @functools.wraps(stage)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return run(cfg)
            with ended(f"experiments.{name}"):
                return run()

        return main

    return decorate


def check_seed(cfg: DictConfig) -> None:
    """Refuse a seed that is no number, as '1' in quotation marks is, or that some source of random numbers refuses.

    Raises:
        ValueError: names it.
    """
    seed = cfg.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}, must be a whole number from 0 to {2**32 - 1}, without quotation marks")


@contextlib.contextmanager
def ended(module: str) -> Iterator[None]:
    """Exit with one line after an interruption, or a refusal that the user can mend. Bugs keep their traceback."""
    for stream in (sys.stdout, sys.stderr):  # whatever the locale; a path may have bytes that are no text
        with contextlib.suppress(AttributeError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    asked = os.environ.get("HYDRA_FULL_ERROR")
    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints the traceback itself, and nothing comes here
        with caught():
            yield
    except Interrupted as interruption:
        if int(os.environ.get("RANK", 0)) == 0:
            name = signal.Signals(interruption.number).name
            print(f"\n{name}: {interruption.kept}. Go on with: {again(module)}", file=sys.stderr)
        sys.exit(128 + interruption.number)
    except Exception as problem:
        if asked or not is_refusal(problem):
            raise
        sys.exit(f"error: {problem}\n(HYDRA_FULL_ERROR=1 shows where it was raised)")
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ.update({"HYDRA_FULL_ERROR": asked} if asked else {})


def again(module: str) -> str:
    """The command line of this process, to be pasted into a shell."""
    start = ["python", "-m"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}", "-m"]
    return shlex.join([*start, module, *sys.argv[1:]])


def is_refusal(problem: BaseException) -> bool:
    """Whether an error is a sentence for the user: raised by a `raise` of this project, or of Hydra about a config."""
    if isinstance(problem, InstantiationException) and problem.__cause__:
        return is_refusal(problem.__cause__)
    if isinstance(problem, (HydraException, OmegaConfBaseException)):
        return True
    place = problem.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    if place is None or place.tb_lasti < 0:
        return False
    code = place.tb_frame.f_code
    raised = dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"  # and no error within an expression
    return raised and any(Path(code.co_filename).is_relative_to(OURS / name) for name in ("drafter", "experiments"))
