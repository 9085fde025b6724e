"""Work shared between processes that ``accelerate launch`` started; without it, one process has all of it."""

import torch
import torch.distributed as dist
from accelerate import PartialState


def join() -> None:
    """Meet the other processes of this launch; call once, at the start of a program."""
    PartialState()


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
    """Replace ``x``, on the device that the launch gave this process, by its sum over all processes."""
    if count() > 1:
        dist.all_reduce(x)
