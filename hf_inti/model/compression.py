"""Compressions by name."""

from .compression_inti import InTICompression
from .compression_pooling import ConvPooling, LinearPooling
from .compression_sta import STA
from .compression_stts import STTS
from .compression_tome import ToMe
from .methods import NoCompression


COMPRESSIONS = {
    "none": NoCompression,
    "inti": InTICompression,
    "linear_pooling": LinearPooling,
    "conv_pooling": ConvPooling,
    "tome": ToMe,
    "sta": STA,
    "stts": STTS,
}
