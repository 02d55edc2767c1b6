"""All stages in one process: prepare, pretrain, respond, cache, finetune (losses x seeds), evaluate, tables.

Config: conf/pipeline.yaml. Each stage is composed from its own config with the same overrides, as on its own command
line, and skips itself where it is up to date; so an interrupted pipeline goes on with the same command.
"""

import logging
import sys
import warnings
from types import ModuleType

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from transformers.utils.logging import disable_progress_bar

from experiments import cache, evaluate, finetune, prepare, pretrain, respond, tables

STAGES = (prepare, pretrain, respond, cache, finetune, evaluate, tables)
NAMES = tuple(module.__name__.rsplit(".", 1)[-1] for module in STAGES)


def main(arguments: list[str]) -> None:
    """Run the stages with the given overrides."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "lightning.pytorch", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()  # of loading weights; the stages' own bars stay
    own = [argument for argument in arguments if argument.partition("=")[0] in ("losses", "seeds")]
    others = [argument for argument in arguments if argument not in own]
    with initialize_config_module("conf", version_base="1.3"):
        plan = compose("pipeline", own)
        stage_configs = [
            (module, name, overrides + of_stage(others, name))
            for module, name in zip(STAGES, NAMES, strict=True)
            for overrides in runs(name, plan)
        ]
        for module, name, overrides in stage_configs:
            run(module, name, overrides)


def runs(stage: str, plan: DictConfig) -> list[list[str]]:
    """The overrides of each run of a stage: finetune has one for each loss and seed, every other stage one."""
    if stage != "finetune":
        return [[]]
    return [[f"loss={loss}", f"seed={seed}"] for seed in plan.seeds for loss in plan.losses]


def of_stage(arguments: list[str], stage: str) -> list[str]:
    """The overrides that are not another stage's own."""
    others = tuple(f"{name}." for name in NAMES if name != stage)
    return [argument for argument in arguments if not argument.lstrip("+~").startswith(others)]


def run(module: ModuleType, name: str, overrides: list[str]) -> None:
    """One stage, as its own command line would run it."""
    cfg = compose(name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    module.main(cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
