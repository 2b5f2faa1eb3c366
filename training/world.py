"""The processes of one training run: one, or several that `torchrun` started (one GPU each)."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unperturb.models.devices import opened_device


class World(NamedTuple):
    """This process's place among `size`, and its device."""

    rank: int
    size: int
    device: torch.device


def join(device: str) -> World:
    """Join torchrun's process group where its variables are set; `device` is cpu, cuda or cuda:N.

    Raises ConfigError for a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, opened_device(device))
    chosen = opened_device(f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") else "cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, chosen)


def leave(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()


def average(world: World, tensors: Iterable[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the processes, in one exchange."""
    if world.size == 1:
        return
    floats = [t for t in tensors if t.is_floating_point()]
    if not floats:
        return
    flat = torch.cat([t.detach().reshape(-1) for t in floats])
    dist.all_reduce(flat)
    for tensor, mean in zip(floats, (flat / world.size).split([t.numel() for t in floats]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


def average_gradients(world: World, model: nn.Module) -> None:
    """Give the global batch's gradients to every process: the mean of their own."""
    average(world, [p.grad for p in model.parameters() if p.grad is not None])


def same_weights(world: World, model: nn.Module) -> None:
    """Give every process rank 0's weights and buffers."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def broadcast(tensor: Tensor) -> None:
    """Give every process rank 0's values, in place."""
    dist.broadcast(tensor, src=0)


def gather(world: World, tensor: Tensor) -> Tensor:
    """Return every process's tensor (all of one shape), one after another along the first side; without gradient."""
    tensor = tensor.detach().contiguous()
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def wait(world: World) -> None:
    """Wait until every process is here."""
    if world.size > 1:
        dist.barrier()
