"""What the tests of hosts share."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_inti.hosts.contract import Hook


def disturb(module: nn.Module) -> nn.Module:
    """The module, its weights moved at random: none is zero."""
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.3)
    return module


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of torchvision's models, which return them, and of transformers'."""
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def hooks_of(model: nn.Module) -> list[Hook]:
    """Everything that a compression has put on it."""
    found = []
    for m in model.modules():
        found += [*m._forward_hooks.values(), *m._forward_pre_hooks.values(), vars(m).get("forward")]
    return [hook for hook in found if isinstance(hook, Hook)]


class Operations(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
