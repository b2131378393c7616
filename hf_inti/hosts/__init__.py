"""Compressions on trained video models of transformers and torchvision: fewer tokens, the same weights.

    model = VideoMAEForVideoClassification.from_pretrained("MCG-NJU/videomae-base-finetuned-kinetics")
    compress(model, "sta", r=64)

`contract.py` says what a host and a method are; each host and each method is one file. None is imported before a model
is compressed, and torchvision by none of them.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import nn

# The file of each class, and of each method.
TORCHVISION_HOSTS = {"SwinTransformer3d": "videoswin", "MViT": "mvit"}
TRANSFORMERS_HOSTS = {
    "VideoMAEForVideoClassification": "videomae",
    "VideoMAEModel": "videomae",
    "TimesformerForVideoClassification": "timesformer",
    "TimesformerModel": "timesformer",
    "VivitForVideoClassification": "vivit",
    "VivitModel": "vivit",
    "VJEPA2ForVideoClassification": "vjepa2",
    "VJEPA2Model": "vjepa2",
}
HOSTS = TRANSFORMERS_HOSTS | TORCHVISION_HOSTS
LIBRARIES = ("transformers", "torchvision")
METHODS = ("sta", "tome", "stts")


def compress(model: "nn.Module", method: str | None, **options) -> "nn.Module":
    """Let a trained video model work on fewer tokens from now on; returns the same model.

    Weights, `state_dict` and what `save_pretrained` writes stay those of the model; only STTS has weights of its own,
    random at first, which `state_dict` then holds under "compression.". To load a model that was saved with them,
    compress it first. Compress a model before compiling or wrapping it.

    Args:
        model: one of the classes of `HOSTS`.
        method: "sta", "tome" or "stts", in the place of any before; None takes it off.
        options: see `sta.hooks`, `sta_windows.hooks` (VideoSwin), `tome.hooks` and `stts.hooks`; r is the number of
            tokens removed. With r = 0, or shares of 1, the model is itself.

    Raises ValueError for another model, method or option, and where the method does not fit the model.
    """
    host = _host_of(model)
    hooks = [] if method is None else _hooks(host, model, method, options)
    host.take_off(model)
    if hooks:
        host.put_on(model, hooks)
    return model


def set_training_progress(model: "nn.Module", progress: float) -> None:
    """Let STTS's noise fade: call it in training with `progress` from 0 to 1, before each step.

    Raises ValueError for a model without STTS, and for another progress.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be from 0 to 1, got {progress!r}.")
    _weights_of(model).set_progress(progress)


def parameter_groups(model: "nn.Module", lr: float = 1e-4, backbone_factor: float = 0.01) -> list[dict]:
    """Groups for an optimiser: the selectors' weights with `lr`, the model's own with `backbone_factor` times as much.

    The defaults are those of STTS on MViT (Sec. 4.1); on VideoSwin it has lr 3e-4. Raises ValueError for a model
    without STTS's weights.
    """
    own = {id(p) for p in _weights_of(model).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in own], "lr": lr},
        {"params": [p for p in trained if id(p) not in own], "lr": lr * backbone_factor},
    ]


def _weights_of(model):
    from .contract import MethodWeights

    weights = getattr(model, "compression", None)
    if not isinstance(weights, MethodWeights):
        raise ValueError(
            f'model must be compressed by "stts", got {type(model).__name__} without; call compress(model, "stts").'
        )
    return weights


def _host_of(model):
    for base in type(model).__mro__:
        if base.__name__ in HOSTS and base.__module__.split(".")[0] in LIBRARIES:
            return import_module(f".{HOSTS[base.__name__]}", __name__).Host(model)
    raise ValueError(
        f"model must be one of {', '.join(HOSTS)} of {' or '.join(LIBRARIES)}, got {type(model).__name__}; compress it "
        "before it is wrapped, and an InTI-CLIP by its configuration."
    )


def _hooks(host, model, method: str, options: dict) -> list:
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or None, got {method!r}; the other compressions have weights "
            "of their own, which the model would need to be trained with."
        )
    if method in host.refuses:
        fits = [name for name in METHODS if name not in host.refuses]
        raise ValueError(f"method must be {', '.join(fits)} on {host.name}, got {method!r}; {host.refuses[method]}.")
    function = import_module(f".{host.files.get(method, method)}", __name__).hooks
    valid = list(inspect.signature(function).parameters)[2:]
    for name in options:
        if name not in valid:
            raise ValueError(f"the options of {method} on {host.name} must be among {', '.join(valid)}, got {name!r}.")
    return function(host, model, **options)
