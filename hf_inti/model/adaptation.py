"""Adaptations by name."""

from .adaptation_aim import AIM
from .adaptation_st_adapter import STAdapter
from .adaptation_uniformerv2 import UniFormerV2
from .adaptation_zeroi2v import ZeroI2V
from .methods import NoAdaptation


ADAPTATIONS = {
    "none": NoAdaptation,
    "uniformerv2": UniFormerV2,
    "zeroi2v": ZeroI2V,
    "aim": AIM,
    "st_adapter": STAdapter,
}
