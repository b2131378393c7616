"""Configuration of InTI-CLIP: CLIP's vision tower plus a compression and an adaptation."""

import difflib
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .adaptation import ADAPTATIONS
from .compression import COMPRESSIONS
from .methods import Tower, check_frames


def _lists(value):
    """As JSON returns it: tuples as lists and keys as strings, at every level."""
    if isinstance(value, dict):
        return {str(name): _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


@strict
class InTIClipVisionConfig(CLIPVisionConfig):
    r"""
    Configuration of [`InTIClipVisionModel`] and [`InTIClipForVideoClassification`]. The fields of
    [`CLIPVisionConfig`] describe the tower; those below what is done to run it on video.

    Args:
        num_frames (`int`, defaults to 16):
            Frames of a clip in training. The model takes any other number that the compression can halve; the video
            classification pipeline samples this many.
        compression (`str`, defaults to `"inti"`):
            How frames or tokens become fewer: `"none"`, `"inti"`, `"linear_pooling"`, `"conv_pooling"`, `"tome"`,
            `"sta"` or `"stts"`. With adaptation `"none"`, `"none"` is the papers' *Naive*.
        compression_layers (`list[int]`, *optional*):
            After which blocks InTI or a pooling stands, counted from 1; 0 is before the first. Defaults to 5/12 and
            7/12 of the depth: 5, 7 for ViT-B and 10, 14 for ViT-L. The other compressions have places of their own.
        compression_options (`dict`, *optional*):
            Options of the compression, such as `{"cube": "dwconv"}`; see its class.
        adaptation (`str`, defaults to `"none"`):
            What lets the tower see time: `"none"`, `"uniformerv2"`, `"zeroi2v"`, `"aim"` or `"st_adapter"`. The last
            three leave CLIP frozen.
        adaptation_options (`dict`, *optional*):
            Options of the adaptation; see its class.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth of the last block; it grows linearly from 0 at the first.
        classifier_dropout (`float`, defaults to 0.0):
            Dropout in front of the classifier.

    Raises ValueError for an unknown name, option or field close to one of these, and for positions or numbers of
    frames that do not fit.

    ```python
    >>> from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig

    >>> config = InTIClipVisionConfig(patch_size=16, num_frames=16, compression_layers=[5, 7], num_labels=400)
    >>> model = InTIClipForVideoClassification(config)
    ```
    """

    model_type = "inti_clip_vision_model"

    num_frames: int = 16
    compression: str = "inti"
    compression_layers: list[int] | tuple[int, ...] | None = None
    compression_options: dict | None = None
    adaptation: str = "none"
    adaptation_options: dict | None = None
    drop_path_rate: float | int = 0.0
    classifier_dropout: float | int = 0.0

    def __post_init__(self, **kwargs):
        own = [f.name for f in fields(InTIClipVisionConfig) if f.name not in {g.name for g in fields(CLIPVisionConfig)}]
        for name in kwargs:
            if close := difflib.get_close_matches(name, own, n=1, cutoff=0.8):
                raise ValueError(
                    f"fields must be those of InTIClipVisionConfig, got {name!r}; did you mean {close[0]!r}?"
                )
        super().__post_init__(**kwargs)
        if self._auto_class is not None:  # save_pretrained records only the class being saved
            self.auto_map = {
                "AutoConfig": "configuration_inti_clip.InTIClipVisionConfig",
                "AutoModel": "modeling_inti_clip.InTIClipVisionModel",
                "AutoModelForVideoClassification": "modeling_inti_clip.InTIClipForVideoClassification",
                "AutoVideoProcessor": "video_processing_inti_clip.InTIClipVideoProcessor",
            }
        self.compression_options = _lists(self.compression_options or {})
        self.adaptation_options = _lists(self.adaptation_options or {})
        if self.compression_layers is None:
            depth = self.num_hidden_layers
            self.compression_layers = sorted({5 * depth // 12, 7 * depth // 12})
        self.compression_layers = _lists(self.compression_layers)
        self.check()

    @property
    def tower(self) -> Tower:
        """The tower's numbers, for the methods."""
        divided = ADAPTATIONS[self.adaptation].frame_multiple(**self.adaptation_options)
        derived = {
            "num_frames": self.num_frames // divided,
            "num_patches": (self.image_size // self.patch_size) ** 2,
        }
        return Tower(**{name: getattr(self, name) for name in Tower._fields if name not in derived}, **derived)

    @property
    def frame_multiple(self) -> int:
        """The number of frames of a clip must be a multiple of this."""
        compression, adaptation = COMPRESSIONS[self.compression], ADAPTATIONS[self.adaptation]
        layers = self.compression_layers if compression.uses_layers else []
        return compression.frame_multiple(layers) * adaptation.frame_multiple(**self.adaptation_options)

    def check(self) -> None:
        """Raise a one-line ValueError for values that do not fit together; also called when a model is built."""
        for word, methods in (("compression", COMPRESSIONS), ("adaptation", ADAPTATIONS)):
            if getattr(self, word) not in methods:
                raise ValueError(f"{word} must be one of {', '.join(methods)}, got {getattr(self, word)!r}.")
        for name in ("image_size", "patch_size"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be one whole number of pixels (square), got {getattr(self, name)!r}.")
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(f"patch_size must be from 1 to image_size {self.image_size}, got {self.patch_size}.")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of the {self.num_attention_heads} heads, got {self.hidden_size}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation that transformers knows, got {self.hidden_act!r}.")
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {self.num_labels}.")
        if isinstance(self.num_frames, bool) or not isinstance(self.num_frames, int) or self.num_frames < 1:
            raise ValueError(f"num_frames must be a whole number of at least 1, got {self.num_frames!r}.")
        for name in ("drop_path_rate", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}.")
        compression, adaptation = COMPRESSIONS[self.compression], ADAPTATIONS[self.adaptation]
        # Names first: below, options are passed as keyword arguments.
        for method, options in ((compression, self.compression_options), (adaptation, self.adaptation_options)):
            method.check_option_names(options)
            method.check_options(self.tower, **options)
        if compression.uses_layers:
            compression.check_layers(self.tower, self.compression_layers)
        check_frames(self.num_frames, self.frame_multiple)
        if adaptation.needs_grid and not compression.keeps_grid:
            raise ValueError(
                f"compression must keep every token at its place for adaptation {self.adaptation!r}, got "
                f"{self.compression!r}, which does not; choose another of the two."
            )

    @classmethod
    def from_clip(cls, clip: str | CLIPConfig | CLIPVisionConfig, **options) -> "InTIClipVisionConfig":
        """The configuration of a CLIP vision tower, for `from_pretrained(clip, config=...)`.

        Args:
            clip: a checkpoint's name or folder (CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection), or its
                configuration.
            options: fields of this class, such as `num_frames`, `compression_layers` or `num_labels`.

        Raises ValueError where `clip` is not CLIP, and as the class does.
        """
        if not isinstance(clip, PreTrainedConfig):
            values, _ = PreTrainedConfig.get_config_dict(clip)
            if not values:
                raise ValueError(
                    f"clip must be the folder or name of a CLIP checkpoint, got {clip}, which has no config.json."
                )
        else:
            values = clip.to_dict()
        if values.get("model_type") == CLIPConfig.model_type:
            # By CLIP's own rules: old checkpoints have their numbers in "vision_config_dict", or leave out defaults.
            values = CLIPConfig.from_dict(values).vision_config.to_dict()
        if values.get("model_type") != CLIPVisionConfig.model_type:
            raise ValueError(
                f"clip must be a CLIP or CLIP vision checkpoint, got model_type {values.get('model_type')!r} from "
                f"{clip if isinstance(clip, str) else type(clip).__name__}; "
                "load an InTI-CLIP checkpoint with InTIClipVisionConfig.from_pretrained."
            )
        names = {f.name for f in fields(CLIPVisionConfig)} - {f.name for f in fields(PreTrainedConfig)}
        return cls(**{**{name: values[name] for name in names if name in values}, **options})


InTIClipVisionConfig.register_for_auto_class()  # saved checkpoints carry the code that loads them
