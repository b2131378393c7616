"""The settings of a training run: what is trained, on what and how. `cli.py` reads them from recipes and flags."""

from dataclasses import dataclass, field, fields

from ..data.layouts import LAYOUTS
from ..model.adaptation import ADAPTATIONS
from ..model.compression import COMPRESSIONS
from ..model.configuration_inti_clip import InTIClipVisionConfig


CHECKPOINTS = "an InTI-CLIP checkpoint's own, else"  # how the help names defaults that a checkpoint may hold


def _help(text: str, default=None, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = _help("Where training starts: a CLIP or InTI-CLIP checkpoint, a folder or a name on the Hub.")
    num_frames: int | None = _help(f"Frames sampled from each clip; default: {CHECKPOINTS} 16.")
    compression: str | None = _help(
        f"How frames or tokens are reduced: {', '.join(COMPRESSIONS)}; default: {CHECKPOINTS} inti."
    )
    compression_layers: list[int] | None = _help(
        f"After which blocks, counted from 1; default: {CHECKPOINTS} 5/12 and 7/12 of the depth."
    )
    compression_options: dict | None = _help("Options of the compression, a mapping (JSON here).")
    adaptation: str | None = _help(
        f"Modules that let the tower see time: {', '.join(ADAPTATIONS)}; default: {CHECKPOINTS} none."
    )
    adaptation_options: dict | None = _help("Options of the adaptation, a mapping (JSON here).")
    drop_path_rate: float | None = _help(
        f"Stochastic depth of the last block, growing linearly from 0 at the first; default: {CHECKPOINTS} 0."
    )
    classifier_dropout: float | None = _help(f"Dropout in front of the classifier; default: {CHECKPOINTS} 0.")
    activation_checkpointing: bool = _help("Recompute activations in the backward pass: less memory, slower.", False)

    def config_options(self) -> dict:
        """Those that are fields of the configuration and were given."""
        names = {f.name for f in fields(self)} & {f.name for f in fields(InTIClipVisionConfig)}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}


@dataclass
class DataArguments:
    """What it is trained and evaluated on, and how clips are made of videos."""

    train_dir: str = _help("Training videos: class folders, a list file, tar shards or a Hub dataset.")
    eval_dir: str | None = _help("Evaluation videos, in the same forms; without it nothing is evaluated.")
    layout: str = _help(f"How both are laid out: auto, or one of {', '.join(LAYOUTS)}.", "auto")
    train_split: str = _help("Which split of train_dir, where it has splits.", "train")
    eval_split: str = _help("Which split of eval_dir, where it has splits.", "test")
    video_root: str | None = _help("Where the videos of list files lie; default: beside the list.")
    streaming: bool = _help("Stream the training videos instead of indexing them; needs --max_steps.", False)
    cache_frames: bool = _help("Decode every video once into datasets' cache: for small sets of short clips.", False)
    num_workers: int = _help("Processes that decode, for each training process.", 0)
    on_bad_video: str = _help("A broken training video is left out and named (skip), or ends the run (error).", "skip")
    sampling: str = _help("Frames over the whole video (uniform), or frame_stride apart (dense).", "uniform")
    frame_stride: int | None = _help("Distance of frames in dense sampling.")
    resize: int | None = _help("Short side in pixels to which training videos are decoded; default: the model's size.")
    squash: bool = _help("Squeeze whole frames to a square, where the sides of wide pictures matter.", False)
    image_mean: list[float] | None = _help("Mean of each channel, of values in [0, 1]; default: CLIP's.")
    image_std: list[float] | None = _help("Standard deviation of each channel; default: CLIP's.")
    crop: str = _help("Training crop: random_resized, multi_scale, random or center.", "random_resized")
    crop_area: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Range of the random_resized crop's share of the area."}
    )
    flip: bool = _help("Mirror half of the training clips.", False)
    flip_label_map: dict | None = _help("Classes that mirroring swaps, {class: class}, names or numbers (JSON).")
    color_jitter_prob: float = _help("Share of clips with changed brightness, contrast, saturation and hue.", 0.0)
    grayscale_prob: float = _help("Share of clips turned grey.", 0.0)
    rand_augment: str | None = _help("RandAugment in timm's notation, such as rand-m7-n4-mstd0.5-inc1.")
    random_erasing_prob: float = _help("Share of clips with a box erased.", 0.0)
    repeats: int = _help("Differently sampled and augmented clips of each loaded video.", 1)
    mixup_alpha: float = _help("Beta distribution of mixup; 0 is off.", 0.0)
    cutmix_alpha: float = _help("Beta distribution of CutMix; 0 is off. With both, each takes half the batches.", 0.0)
    label_smoothing: float = _help("Share of the target spread over all classes.", 0.0)

    def __post_init__(self):
        if self.on_bad_video not in ("skip", "error"):
            raise ValueError(f"on_bad_video must be skip or error, got {self.on_bad_video!r}.")
        if self.streaming and (self.cache_frames or self.on_bad_video == "error"):
            raise ValueError("streaming goes neither with cache_frames nor with on_bad_video error; leave these out.")


@dataclass
class TrainingArguments:
    """How it is trained."""

    output_dir: str = _help("Folder for checkpoints, metrics and the trained model.")
    epochs: int = _help("Passes over the training videos.", 30)
    max_steps: int | None = _help("Stop after so many optimiser steps; the schedule ends there too.")
    batch_size: int = _help("Videos in each step of each process.", 8)
    eval_batch_size: int = _help("Videos in each evaluation batch of each process.", 8)
    gradient_accumulation_steps: int = _help("Batches in each optimiser step.", 1)
    learning_rate: float = _help("Peak learning rate, as is: not scaled by the batch.", 2.2e-5)
    new_module_lr_multiplier: float = _help("Times this for what CLIP has not: compression, adaptation, head.", 1.0)
    min_lr_ratio: float = _help("Last learning rate as a share of the peak.", 0.01)
    warmup_epochs: float = _help("Epochs in which the learning rate rises linearly from 0.", 0.0)
    weight_decay: float = _help("AdamW's weight decay.", 0.05)
    decay_norms_and_biases: bool = _help("Apply weight decay to biases and norms too.", False)
    adam_beta1: float = _help("AdamW's first beta.", 0.9)
    adam_beta2: float = _help("AdamW's second beta.", 0.999)
    adam_epsilon: float = _help("AdamW's epsilon.", 1e-8)
    max_grad_norm: float | None = _help("Clip the gradient to this norm; default: no clipping.")
    mixed_precision: str = _help("Numbers to compute with: bf16, fp16, or no for float32.", "no")
    ema_decay: float | None = _help("Keep a moving average of the weights with this decay, and evaluate and save that.")
    seed: int = _help("Seed of the head, the order of videos and all augmentation.", 0)
    eval_every_epochs: int = _help("Evaluate after every so many epochs (one view of each video).", 1)
    checkpoint_every_epochs: int | None = _help("Write a checkpoint to resume from after every so many epochs.", 1)
    checkpoint_every_steps: int | None = _help("Write one after every so many optimiser steps.")
    resume: bool = _help("Go on from the newest checkpoint in output_dir, in the middle of an epoch too.", False)
    log_every_steps: int = _help("Write loss and learning rate after every so many optimiser steps.", 10)
    push_to_hub: str | None = _help("Push the best model (without evaluation the last) to this repository: user/name.")
    hub_private: bool = _help("Make that repository private, if it is new.", False)
    report_to: str | None = _help("A tracker that Accelerate knows, such as tensorboard or wandb, or all.")

    def __post_init__(self):
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        for name in ("epochs", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}; leave it out to train all epochs.")
