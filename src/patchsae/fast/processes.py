"""Work shared between processes that ``accelerate launch`` started; without it, one process has all of it."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def join() -> None:
    """Meet the other processes of this launch; call once, at the start of a program.

    One may wait for another as long as a pass over a data set takes.
    """
    try:
        from accelerate import PartialState  # an extra: who starts one process has no use for it
    except ModuleNotFoundError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        raise OSError("Processes share work through accelerate, which is not installed; run "
                      "pip install 'patchsae[scale]'.") from error
    PartialState(timeout=timedelta(days=1))


def count() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; the first one writes files and shows bars."""
    return dist.get_rank() if count() > 1 else 0


def share(n: int) -> range:
    """This process's part of n things: contiguous, so that parts put together in order are the whole in order."""
    return range(n * rank() // count(), n * (rank() + 1) // count())


def wait() -> None:
    """Go on when every process has come here."""
    if count() > 1:
        dist.barrier()


def gathered(value) -> list:
    """What every process gives, in their order, on each of them; ``value`` may be any object on the CPU."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def add_up(x: torch.Tensor) -> None:
    """Replace ``x``, on the device that the launch gave this process, by its sum over all of them."""
    if count() > 1:
        dist.all_reduce(x)


def average(tensors: list[torch.Tensor]) -> None:
    """Put into each tensor its mean over the processes; gradients of sharded weights are means already."""
    if count() > 1:
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                dist.all_reduce(tensor)
                tensor /= count()


def anywhere(flags: torch.Tensor) -> torch.Tensor:
    """Where a flag of any process holds."""
    if count() == 1:
        return flags
    found = flags.to(torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool()


def most(number: torch.Tensor) -> int:
    """The largest of a number that each process has."""
    return max(gathered(number.item()))


# Weights too large for one device

def shard(module: nn.Module, method: str) -> bool:
    """Where ``accelerate launch --use_fsdp`` asks for it, give each process a part of every weight; whether it did.

    The weights are put together for the time that ``method`` runs.
    """
    asked = count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if asked:
        kind = next(module.parameters()).device.type
        fully_shard(module, mesh=init_device_mesh(kind, (count(),)))
        register_fsdp_forward_method(module, method)
    return asked


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from its parts, if it has any; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor in parts as those of another."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
