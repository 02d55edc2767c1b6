"""Weights split over ranks: FSDP2 for drafter and frozen target, tensor parallelism for a target that answers.

With FSDP2 (torch.distributed.fsdp.fully_shard) each rank keeps its part of each layer and gathers a whole layer when it
is computed; ranks see different samples, and have to take the same number of steps. With tensor parallelism
(transformers' own plan of the architecture) each rank computes its part of each product, and all see the same samples.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel


def check_parallel(parallel: str | None, allowed: str, stage: str) -> None:
    """Refuse a way of splitting the target that a stage does not have.

    Raises:
        ValueError: names it, and the stage's own.
    """
    if parallel not in (None, allowed):
        ways = f"null (every rank has a whole one) or {allowed}"
        raise ValueError(f"target.parallel is '{parallel}', but {stage} takes {ways}")
    if parallel and not dist.is_torchelastic_launched():
        raise ValueError(f"target.parallel is '{parallel}', which splits it over the ranks of torchrun: there are none")


def shard_module(module: nn.Module, model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """FSDP2 of a trainable model in a Lightning module, whose two steps gather what they need of it. Done once."""
    if not isinstance(module, FSDPModule):
        _shard_layers(model, mesh)
        fully_shard(module, mesh=mesh)
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(module, step)


def shard_frozen(model: PreTrainedModel, device: torch.device) -> None:
    """FSDP2 of a frozen model over the GPUs of each node; every rank keeps the embeddings whole. Done once."""
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
