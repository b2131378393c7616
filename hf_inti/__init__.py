"""InTI (inter-frame token interpolation) for CLIP on video, for transformers.

Classes are loaded, and made known to transformers' Auto classes, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto_registration import register, register_when_used


if TYPE_CHECKING:
    from .model.configuration_inti_clip import InTIClipVisionConfig
    from .model.modeling_inti_clip import InTIClipForVideoClassification, InTIClipVisionModel
    from .model.video_decoding import VideoDecodingError
    from .model.video_processing_inti_clip import InTIClipVideoProcessor

__version__ = "0.1.0"
__all__ = [
    "InTIClipForVideoClassification",
    "InTIClipVideoProcessor",
    "InTIClipVisionConfig",
    "InTIClipVisionModel",
    "VideoDecodingError",
]

_MODULES = {
    "InTIClipForVideoClassification": "model.modeling_inti_clip",
    "InTIClipVideoProcessor": "model.video_processing_inti_clip",
    "InTIClipVisionConfig": "model.configuration_inti_clip",
    "InTIClipVisionModel": "model.modeling_inti_clip",
    "VideoDecodingError": "model.video_decoding",
}

register_when_used()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return globals().setdefault(name, getattr(import_module(f".{_MODULES[name]}", __name__), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
