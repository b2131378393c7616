"""The settings of a training run: model, data and training. `cli.py` reads them from recipes and flags."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..data.layouts import LAYOUTS
from ..model.adaptation import ADAPTATIONS
from ..model.compression import COMPRESSIONS
from ..model.configuration_inti_clip import InTIClipVisionConfig


OWN = "an InTI-CLIP checkpoint's own, else"  # defaults that a checkpoint may set, in help texts


def _help(text: str, default=None, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """Which model is trained."""

    model: str | None = _help("Checkpoint to start from, CLIP or InTI-CLIP: a folder or a name on the Hub.")
    host: str | None = _help(
        "Instead: transformers/CHECKPOINT (VideoMAE, ViViT, TimeSformer, V-JEPA 2) or torchvision/NAME (MViT, swin3d)."
    )
    host_weights: str | None = _help(
        "Published weights of torchvision, such as KINETICS400_V1, which are downloaded; default: random ones."
    )
    num_frames: int | None = _help(f"Frames sampled from each clip; default: {OWN} 16.")
    compression: str | None = _help(
        f"Method that reduces frames or tokens: {', '.join(COMPRESSIONS)}; default: {OWN} inti."
    )
    compression_layers: list[int] | None = _help(
        f"Blocks after which it is applied, counted from 1; default: {OWN} 5/12 and 7/12 of the depth."
    )
    compression_options: dict | None = _help("Options of the compression, as a mapping (JSON on the command line).")
    adaptation: str | None = _help(
        f"Modules that give the tower temporal modeling: {', '.join(ADAPTATIONS)}; default: {OWN} none."
    )
    adaptation_options: dict | None = _help("Options of the adaptation, as a mapping (JSON on the command line).")
    drop_path_rate: float | None = _help(
        f"Stochastic depth of the last block, rising linearly from 0 at the first; default: {OWN} 0."
    )
    classifier_dropout: float | None = _help(f"Dropout before the classifier; default: {OWN} 0.")
    activation_checkpointing: bool = _help("Recompute activations in the backward pass: less memory, slower.", False)

    def __post_init__(self):
        if self.model is None and self.host is None:
            raise ValueError("model must be set with --model or in the recipe, got neither it nor a host; see --help.")
        if self.host_weights is not None and self.host is None:
            raise ValueError(f"host_weights must be left out without a host, got {self.host_weights!r}.")
        if self.model is not None and self.host is not None:
            raise ValueError(f"model must be left out with a host, got {self.model!r} and {self.host!r}.")

    @property
    def checkpoint(self) -> str:
        """What training starts from, without the host's library."""
        return self.model if self.host is None else self.host.partition("/")[2]

    @property
    def base_model(self) -> str | None:
        """Its name, if it is one on the Hub."""
        local = Path(self.checkpoint).exists() or (self.host or "").startswith("torchvision/")
        return None if local else self.checkpoint

    def config_options(self) -> dict:
        """The settings that are given and are fields of InTIClipVisionConfig."""
        names = {f.name for f in fields(self)} & {f.name for f in fields(InTIClipVisionConfig)}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}


@dataclass
class DataArguments:
    """Which videos it is trained and evaluated on, and how clips are made from them."""

    train_dir: str = _help("Training videos: class folders, a list file, tar shards or a Hub dataset.")
    eval_dir: str | None = _help("Evaluation videos, in the same layouts; default: no evaluation.")
    layout: str = _help(f"Layout of both: auto, or one of {', '.join(LAYOUTS)}.", "auto")
    train_split: str = _help("Split of train_dir, if it has splits.", "train")
    eval_split: str = _help("Split of eval_dir, if it has splits.", "test")
    video_root: str | None = _help("Folder of the videos in list files; default: the list's own folder.")
    allow_outside_root: bool = _help("Let list files name videos outside video_root.", False)
    streaming: bool = _help("Stream the training videos instead of indexing them; needs --max_steps.", False)
    cache_frames: bool = _help("Decode every video once into datasets' cache: for small sets of short clips.", False)
    num_workers: int = _help("Decoding processes per training process.", 0)
    on_bad_video: str = _help("Broken training videos: skip and report them, or stop with an error.", "skip")
    sampling: str | None = _help(
        f"Frames spread over the video (uniform) or frame_stride apart (dense); default: {OWN} uniform."
    )
    frame_stride: int | None = _help(f"Distance between frames in dense sampling; default: {OWN} none.")
    resize: int | None = _help("Short side in pixels to which training videos are decoded; default: the model's size.")
    squash: bool | None = _help(
        f"Squash whole frames to a square instead of cropping them; default: {OWN} false.", nargs="?", const=True
    )
    image_mean: list[float] | None = _help(f"Mean per channel of values in [0, 1]; default: {OWN} CLIP's.")
    image_std: list[float] | None = _help(f"Standard deviation per channel; default: {OWN} CLIP's.")
    crop: str = _help("Training crop: random_resized, multi_scale, random or center.", "random_resized")
    crop_area: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Range of the area, as a share, for random_resized."}
    )
    flip: bool = _help("Mirror half of the training clips.", False)
    flip_label_map: dict | None = _help("Classes that mirroring swaps, {class: class}, names or numbers (JSON).")
    color_jitter_prob: float = _help("Share of clips with jittered brightness, contrast, saturation and hue.", 0.0)
    grayscale_prob: float = _help("Share of clips turned grey.", 0.0)
    rand_augment: str | None = _help("RandAugment in timm's notation, such as rand-m7-n4-mstd0.5-inc1.")
    random_erasing_prob: float = _help("Share of clips with a box erased.", 0.0)
    repeats: int = _help("Clips sampled and augmented from each loaded video.", 1)
    mixup_alpha: float = _help("Alpha of mixup's Beta distribution; 0 is off.", 0.0)
    cutmix_alpha: float = _help("Alpha of CutMix's Beta distribution; 0 is off. With both, each gets half.", 0.0)
    label_smoothing: float = _help("Share of the target spread over all classes.", 0.0)

    def __post_init__(self):
        if self.on_bad_video not in ("skip", "error"):
            raise ValueError(f"on_bad_video must be skip or error, got {self.on_bad_video!r}.")
        if self.streaming and self.cache_frames:
            raise ValueError("cache_frames must be off when streaming, got true; leave one of them out.")
        if self.streaming and self.on_bad_video == "error":
            raise ValueError("on_bad_video must be skip when streaming, got 'error'; leave one of them out.")


@dataclass
class TrainingArguments:
    """How it is trained."""

    output_dir: str = _help("Folder for checkpoints, metrics and the trained model.")
    epochs: int = _help("Passes over the training videos.", 30)
    max_steps: int | None = _help("Optimizer steps after which training ends, and with it the schedule.")
    batch_size: int = _help("Videos per batch and process.", 8)
    eval_batch_size: int = _help("Videos per evaluation batch and process.", 8)
    gradient_accumulation_steps: int = _help("Batches per optimizer step.", 1)
    learning_rate: float = _help("Peak learning rate, used as given: not scaled by the batch size.", 2.2e-5)
    new_module_lr_multiplier: float = _help(
        "Learning-rate multiplier for modules absent from CLIP: compression and adaptation.", 1.0
    )
    head_lr_multiplier: float = _help("Learning-rate multiplier for the classifier.", 1.0)
    min_lr_ratio: float = _help("Final learning rate as a share of the peak.", 0.01)
    warmup_epochs: float = _help("Epochs over which the learning rate rises linearly from 0.", 0.0)
    weight_decay: float = _help("AdamW's weight decay.", 0.05)
    decay_norms_and_biases: bool = _help("Apply weight decay to biases and norms too.", False)
    adam_beta1: float = _help("AdamW's first beta.", 0.9)
    adam_beta2: float = _help("AdamW's second beta.", 0.999)
    adam_epsilon: float = _help("AdamW's epsilon.", 1e-8)
    max_grad_norm: float | None = _help("Norm to which gradients are clipped; default: no clipping.")
    max_skipped_steps: int = _help("Steps to skip, because loss or gradients are NaN or infinite, before it stops.", 5)
    mixed_precision: str = _help("Precision of the computation: bf16, fp16, or no for float32.", "no")
    ema_decay: float | None = _help("Decay of a moving average of the weights, which is then evaluated and saved.")
    seed: int = _help("Seed of new weights, the order of videos and all augmentation.", 0)
    eval_every_epochs: int = _help("Epochs between evaluations (one view per video).", 1)
    checkpoint_every_epochs: int | None = _help("Epochs between checkpoints to resume from.", 1)
    checkpoint_every_steps: int | None = _help("Optimizer steps between such checkpoints; default: none within epochs.")
    resume: bool = _help("Continue from the newest checkpoint in output_dir, in the middle of an epoch too.", False)
    log_every_steps: int = _help("Optimizer steps between records of loss and learning rate.", 10)
    push_to_hub: str | None = _help("Repository, user/name, to push the best model to (without evaluation, the last).")
    hub_private: bool = _help("Make that repository private if it is new.", False)
    report_to: str | None = _help("Tracker that Accelerate supports, such as tensorboard or wandb, or all.")

    def __post_init__(self):
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        for name in ("epochs", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}; leave it out to train all epochs.")
