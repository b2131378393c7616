"""The contract between hosts and methods.

A method is a set of forward hooks on the modules that its host names, so weights, classes and `state_dict` stay as they
are, and copying or pickling the model takes the hooks along. What the hooks know about the tokens of one forward pass
is a `Trace`. It travels through the arguments of the blocks, so several threads may use a model, and a block that
activation checkpointing runs again finds what it found before.

Letters: B clips, L tokens of a clip (the class token first, where the host has one), N of them patches, D width, T
frames (after the tubelet embedding). Blocks are counted from 1.
"""

import threading
from typing import NamedTuple

import torch
from torch import nn


TRACE = "compression_trace"  # the keyword argument in which a trace travels


class Tokens(NamedTuple):
    """What is known about the tokens between two blocks; None: as they were embedded."""

    groups: int | None = None  # into which STA divides the patches
    places: torch.Tensor | None = None  # (B, N): the index of each patch among those embedded
    sizes: torch.Tensor | None = None  # (B, L): the number of tokens merged into each


class Trace:
    """One forward pass: the tokens after each block that changed them, and what is found inside the current block."""

    def __init__(self):
        self.tokens = {0: Tokens()}
        self.feature = None  # (B, L, d), by which tokens are compared
        self.matching = None  # which tokens ToMe merges in this block
        self.output = None  # (B, L, D), of the last block, where the host's pooling has to read it

    def before(self, i: int) -> Tokens:
        return self.tokens[max(block for block in self.tokens if block < i)]


class Current:
    """The trace of the pass that each thread is in, for hooks that see no argument but a tensor."""

    def __init__(self):
        self.traces = {}

    def set(self, trace: Trace) -> None:
        self.traces[self._thread()] = trace

    def get(self) -> Trace:
        return self.traces[self._thread()]

    def pop(self) -> Trace | None:
        return self.traces.pop(self._thread(), None)

    @staticmethod
    def _thread() -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    def __reduce__(self):  # a copy of the model is in no pass
        return Current, ()


class Block(NamedTuple):
    """A block of the host, and the modules in it that methods hook."""

    block: nn.Module  # tokens -> tokens, or a tuple that begins with them
    attention: nn.Module
    projections: dict[str, nn.Module]  # "query", "key" and "value", with heads side by side
    norm: nn.Module  # reads the tokens between attention and MLP
    mlp: nn.Module  # its output is added to them


class Hook:
    """A hook on a module's output, which runs before any other. A plain object, so that it can be pickled."""

    def __init__(self, host: "BaseHost", current: Current, i: int = 0):
        self.host, self.current, self.i = host, current, i

    def register(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self, prepend=True, with_kwargs=True)


class PreHook(Hook):
    """A hook on a module's arguments."""

    def register(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)


class Forward(Hook):
    """In the place of a module's forward, as an attribute of the instance: its class, weights and hooks stay."""

    def register(self, module: nn.Module) -> None:
        self.module = module
        module.forward = self


class MethodWeights(nn.Module):
    """The weights of a method that has some: `model.compression`, while the method is on."""

    def set_progress(self, progress: float) -> None:
        """Update anything scheduled over training; `progress` runs from 0 to 1."""


class Begin(PreHook):
    """On the encoder: begins a trace."""

    def __call__(self, module, args, kwargs):
        return self.host.begin(args, kwargs, Trace())


class End(Hook):
    """On the encoder: forgets it."""

    def __call__(self, module, args, kwargs, output) -> None:
        self.current.pop()


class Receive(PreHook):
    """On a block's attention: takes the trace out of the arguments and puts in what the trace says of the tokens."""

    def __init__(self, *where, prop_attn: bool = False):
        super().__init__(*where)
        self.prop_attn = prop_attn

    def __call__(self, module, args, kwargs):
        args, kwargs, trace = self.host.receive(args, kwargs)
        self.current.set(trace)
        tokens = trace.before(self.i)
        bias = tokens.sizes.log() if self.prop_attn and tokens.sizes is not None else None
        return self.host.attend(module, args, kwargs, tokens, bias)


class Feature(Hook):
    """On a projection or on the MLP: its output is what tokens are compared by."""

    def __init__(self, *where, similarity: str):
        super().__init__(*where)
        self.similarity = similarity

    def __call__(self, module, args, kwargs, output) -> None:
        self.current.get().feature = self.host.feature(output.detach(), self.similarity)


class BaseHost:
    """What methods need to know about a model. Holds numbers and no modules: hooks keep it.

    A host's file defines `Host(model)`, which raises ValueError for a model that no method fits.
    """

    name: str
    class_tokens = 0
    takes_bias = False  # whether attention takes a bias on its keys, see `check_bias`
    any_length = False  # whether a clip may have another number of frames than the configuration says
    refuses: dict[str, str] = {"stts": "here it is on the hosts of its paper, VideoSwin and MViT"}  # with the reason
    files: dict[str, str] = {}  # of the methods that have a file of their own for this host
    grid: tuple[int, int, int]  # T, rows and columns of the patches of a clip
    depth: int
    heads: int

    @property
    def num_merging(self) -> int:
        """The number of tokens that ToMe chooses among, without class tokens."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def check_bias(self, implementation: str) -> None:
        """Raise a ValueError unless this implementation of the host's attention takes a bias."""
        raise ValueError(
            f"ToMe's prop_attn must be false on {self.name}, whose attention takes no bias, got True; leave it out."
        )

    def encoder(self, model: nn.Module) -> nn.Module:
        """The module whose call runs the blocks."""
        raise NotImplementedError

    def blocks(self, model: nn.Module) -> list[Block]:
        raise NotImplementedError

    def begin(self, args, kwargs, trace: Trace):
        """The encoder's arguments, changed so that every block gets the trace."""
        return args, {**kwargs, TRACE: trace}

    def trace(self, args, kwargs) -> Trace:
        """The trace in a block's arguments."""
        return kwargs[TRACE]

    def receive(self, args, kwargs):
        """The arguments of a block's attention -> those it would have without us, and the trace."""
        return args, {name: value for name, value in kwargs.items() if name != TRACE}, kwargs[TRACE]

    def attend(self, attention: nn.Module, args, kwargs, tokens: Tokens, bias: torch.Tensor | None):
        """The arguments of attention on these tokens, with a bias (B, L) on the keys."""
        return args, kwargs

    def feature(self, output: torch.Tensor, similarity: str) -> torch.Tensor:
        """The output of a projection, or of the MLP for "ffn" -> features (B, L, d), a mean over heads."""
        return output if similarity == "ffn" else output.unflatten(-1, (self.heads, -1)).mean(dim=-2)

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) -> (B, L', D'), one for each token that ToMe may merge."""
        return x

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `fold`."""
        return x

    def hooks(self, model: nn.Module, method: str, current: Current, **receive) -> list[tuple[nn.Module, Hook]]:
        """What every method needs on this host."""
        encoder = self.encoder(model)
        found = [(encoder, Begin(self, current)), (encoder, End(self, current))]
        for i, block in enumerate(self.blocks(model), start=1):
            found.append((block.attention, Receive(self, current, i, **receive)))
        return found

    def put_on(self, model: nn.Module, hooks: list[tuple[nn.Module, Hook]]) -> None:
        for module, hook in hooks:
            hook.register(module)

    def take_off(self, model: nn.Module) -> None:
        if isinstance(getattr(model, "compression", None), MethodWeights):
            del model.compression
        for module in model.modules():
            for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
                if isinstance(hook, Hook):
                    hook.handle.remove()
            if isinstance(vars(module).get("forward"), Forward):
                del module.forward


def first(output) -> torch.Tensor:
    """The tokens in a block's output."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output, x: torch.Tensor):
    """A block's output with other tokens."""
    return (x, *output[1:]) if isinstance(output, tuple) else x
