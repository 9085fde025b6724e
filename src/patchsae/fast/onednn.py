"""Linear layers on a CPU through oneDNN.

PyTorch hands float32 products on the CPU to MKL, which on processors of other makers than Intel reaches about half of
what oneDNN does. Both calculate in float32 from end to end and differ in rounding alone. Layers of small models stay
with MKL, where there is little to gain, so that their results keep their bits.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

#: A layer of at least so many inputs is worth it.
WIDE = 768


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, relu: bool = False) -> torch.Tensor:
    """x W^T + b, and relu of it in the same pass where asked: ``[...,D], [S,D], [S] -> [...,S]``; no gradients."""
    if serves(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    y = F.linear(x, weight, bias)
    return torch.relu_(y) if relu else y


def serves(x: torch.Tensor) -> bool:
    """Whether oneDNN is there and can take ``x [...,D]`` as the input of a layer."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] >= WIDE
            and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class Linears(TorchFunctionMode):
    """A context: while it lasts, whoever computes a linear layer without gradients goes through oneDNN where it serves.

    So a tower of any library is sped up as it is, without a copy of its weights in another layout.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not torch.is_grad_enabled() and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))
