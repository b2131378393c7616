"""Adaptations by name."""

from .token_state import NoAdaptation


ADAPTATIONS = {
    "none": NoAdaptation,
}
