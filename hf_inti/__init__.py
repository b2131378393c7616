"""InTI (inter-frame token interpolation) for CLIP on video, for transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # the top-level name needs torchvision

from .configuration_inti_clip import InTIClipVisionConfig
from .modeling_inti_clip import InTIClipForVideoClassification, InTIClipVisionModel
from .video_decoding import VideoDecodingError
from .video_processing_inti_clip import InTIClipVideoProcessor


__version__ = "0.1.0"
__all__ = [
    "InTIClipForVideoClassification",
    "InTIClipVideoProcessor",
    "InTIClipVisionConfig",
    "InTIClipVisionModel",
    "VideoDecodingError",
]

AutoConfig.register(InTIClipVisionConfig.model_type, InTIClipVisionConfig)
AutoModel.register(InTIClipVisionConfig, InTIClipVisionModel)
AutoModelForVideoClassification.register(InTIClipVisionConfig, InTIClipForVideoClassification)
AutoVideoProcessor.register(InTIClipVisionConfig, InTIClipVideoProcessor)

# So that what is saved carries the code that loads it where this package is not installed.
InTIClipVisionConfig.register_for_auto_class()
InTIClipVisionModel.register_for_auto_class("AutoModel")
InTIClipForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
InTIClipVideoProcessor.register_for_auto_class()
