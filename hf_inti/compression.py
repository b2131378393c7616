"""Compressions by name."""

from .compression_inti import InTICompression
from .token_state import NoCompression


COMPRESSIONS = {
    "none": NoCompression,
    "inti": InTICompression,
}
