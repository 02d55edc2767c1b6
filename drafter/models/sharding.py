"""Weights split over ranks: FSDP2 for the drafter and the frozen target in training, tensor parallelism elsewhere.

With FSDP2 (torch.distributed.fsdp.fully_shard), each rank stores a part of each layer and gathers the full layer to
compute it. Ranks have different samples and must take the same number of steps. With tensor parallelism (the plan that
transformers has for the architecture), each rank computes a part of each product, and all have the same samples.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel


def check_parallel(parallel: str | None, allowed: str, stage: str) -> None:
    """Raise if a stage cannot split the target in the given way.

    Args:
        parallel: the value of target.parallel.
        allowed: the only value but None that the stage supports.
        stage: the stage's name.

    Raises:
        ValueError: the stage does not support the value, or the process was not started by torchrun.
    """
    if parallel not in (None, allowed):
        options = f"null (every rank has a full copy) or {allowed}"
        raise ValueError(f"target.parallel is '{parallel}', but {stage} takes {options}")
    if parallel and not dist.is_torchelastic_launched():
        raise ValueError(
            f"target.parallel is '{parallel}', which splits the target over the ranks of torchrun: there are none"
        )


def shard_module(module: nn.Module, model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to a trainable model in a Lightning module, unless it is sharded already.

    The training and validation steps are registered as forward methods, so that they gather the weights.
    """
    if not isinstance(module, FSDPModule):
        _shard_layers(model, mesh)
        fully_shard(module, mesh=mesh)
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(module, step)


def shard_frozen(model: PreTrainedModel, device: torch.device) -> None:
    """Apply FSDP2 to a frozen model over the GPUs of each node, unless it is sharded already.

    Every rank keeps the full embeddings.
    """
    if not isinstance(model.base_model, FSDPModule):
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        mesh = init_device_mesh(device.type, (dist.get_world_size() // local, local), mesh_dim_names=("node", "gpu"))
        embeddings = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
        _shard_layers(model, mesh["gpu"])
        fully_shard(model.base_model, mesh=mesh["gpu"], ignored_params=embeddings)


def _shard_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    kinds = set(model._no_split_modules or ())
    for layer in [part for part in model.modules() if type(part).__name__ in kinds]:
        fully_shard(layer, mesh=mesh)
