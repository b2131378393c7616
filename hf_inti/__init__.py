"""InTI (inter-frame token interpolation) for CLIP on video, for transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification

from .configuration_inti_clip import InTIClipVisionConfig
from .modeling_inti_clip import InTIClipForVideoClassification, InTIClipVisionModel


__version__ = "0.1.0"
__all__ = ["InTIClipForVideoClassification", "InTIClipVisionConfig", "InTIClipVisionModel"]

AutoConfig.register(InTIClipVisionConfig.model_type, InTIClipVisionConfig)
AutoModel.register(InTIClipVisionConfig, InTIClipVisionModel)
AutoModelForVideoClassification.register(InTIClipVisionConfig, InTIClipForVideoClassification)
