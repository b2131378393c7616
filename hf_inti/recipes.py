"""The settings of a training run, read from a YAML recipe and the command line.

    parse_recipe([ModelArguments, ...], ["recipe.yaml", "--learning_rate", "1e-4"])

A recipe holds the same names as the command line has flags; what the command line says wins.
"""

import difflib
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import yaml
from transformers import HfArgumentParser

from .configuration_inti_clip import InTIClipVisionConfig
from .video_lists import LAYOUTS


def _help(text: str, default=None, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


def _mapping(value: str | dict | None, name: str) -> dict:
    """A mapping as YAML gives it, or as JSON on the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            example = '{"cube": "dwconv"}'
            raise ValueError(f"--{name} takes a JSON mapping such as '{example}', got {value!r} ({error}).") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping of option names to values, got {value!r}.")
    return value or {}


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = _help("Where training starts: a CLIP or InTI-CLIP checkpoint, a folder or a name on the Hub.")
    num_frames: int = _help("Frames sampled from each clip.", 16)
    compression: str = _help("How frames or tokens are reduced: none (every frame in full) or inti.", "inti")
    compression_layers: list[int] | None = _help(
        "After which blocks, counted from 1; default: 5/12 and 7/12 of the depth."
    )
    compression_options: str | dict | None = _help("Options of the compression, a mapping (JSON here).")
    adaptation: str = _help("Modules that let the tower see time: none.", "none")
    adaptation_options: str | dict | None = _help("Options of the adaptation, a mapping (JSON here).")
    drop_path_rate: float = _help("Stochastic depth of the last block, growing linearly from 0 at the first.", 0.0)
    classifier_dropout: float = _help("Dropout in front of the classifier.", 0.0)
    activation_checkpointing: bool = _help("Recompute activations in the backward pass: less memory, slower.", False)

    def __post_init__(self):
        self.compression_options = _mapping(self.compression_options, "compression_options")
        self.adaptation_options = _mapping(self.adaptation_options, "adaptation_options")

    def config_options(self) -> dict:
        """Those that are fields of the configuration."""
        names = {f.name for f in fields(self)} & {f.name for f in fields(InTIClipVisionConfig)}
        return {name: getattr(self, name) for name in names}


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
    on_bad_video: str = _help("A broken training video is left out and reported (skip), or stops the run (error).", "skip")
    sampling: str = _help("Frames over the whole video (uniform), or frame_stride apart (dense).", "uniform")
    frame_stride: int | None = _help("Distance of frames in dense sampling.")
    resize: int | None = _help("Short side in pixels to which training videos are decoded; default: the model's size.")
    image_mean: list[float] | None = _help("Mean of each channel, of values in [0, 1]; default: CLIP's.")
    image_std: list[float] | None = _help("Standard deviation of each channel; default: CLIP's.")
    crop: str = _help("Training crop: random_resized, multi_scale, random or center.", "random_resized")
    crop_area: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Range of the random_resized crop's share of the area."}
    )
    flip: bool = _help("Mirror half of the training clips.", False)
    flip_label_map: str | dict | None = _help("Classes that mirroring swaps, {class: class} by name or number (JSON here).")
    color_jitter_prob: float = _help("Share of clips with changed brightness, contrast, saturation and hue.", 0.0)
    grayscale_prob: float = _help("Share of clips turned grey.", 0.0)
    rand_augment: str | None = _help("RandAugment in timm's notation, such as rand-m7-n4-mstd0.5-inc1.")
    random_erasing_prob: float = _help("Share of clips with a box erased.", 0.0)
    repeats: int = _help("Differently sampled and augmented clips of each loaded video.", 1)
    mixup_alpha: float = _help("Beta distribution of mixup; 0 is off.", 0.0)
    cutmix_alpha: float = _help("Beta distribution of CutMix; 0 is off. With both on, each takes half of the batches.", 0.0)
    label_smoothing: float = _help("Share of the target spread over all classes.", 0.0)
    num_clips: int = _help("Clips of each video in the evaluation at the end.", 1)
    num_crops: int = _help("Crops of each clip in the evaluation at the end, 1 or 3.", 1)

    def __post_init__(self):
        self.flip_label_map = _mapping(self.flip_label_map, "flip_label_map")
        if self.on_bad_video not in ("skip", "error"):
            raise ValueError(f"on_bad_video must be skip or error, got {self.on_bad_video!r}.")


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
    new_module_lr_multiplier: float = _help("Times this for what CLIP does not have: compression, adaptation, head.", 1.0)
    min_lr_ratio: float = _help("Last learning rate as a share of the peak.", 0.01)
    warmup_epochs: float = _help("Epochs in which the learning rate rises linearly from 0.", 0.0)
    weight_decay: float = _help("AdamW's weight decay.", 0.05)
    decay_norms_and_biases: bool = _help("Apply weight decay to biases and norms too.", False)
    adam_beta1: float = _help("AdamW's first beta.", 0.9)
    adam_beta2: float = _help("AdamW's second beta.", 0.999)
    adam_epsilon: float = _help("AdamW's epsilon.", 1e-8)
    max_grad_norm: float | None = _help("Clip the gradient to this norm; default: no clipping.")
    mixed_precision: str = _help("no, bf16 or fp16.", "no")
    ema_decay: float | None = _help("Keep a moving average of the weights with this decay, and evaluate and save that.")
    seed: int = _help("Seed of the head, the order of videos and all augmentation.", 0)
    eval_every_epochs: int = _help("Evaluate after every so many epochs (one view of each video).", 1)
    checkpoint_every_epochs: int | None = _help("Write a checkpoint to resume from after every so many epochs.", 1)
    checkpoint_every_steps: int | None = _help("Write one after every so many optimiser steps.")
    resume: bool = _help("Go on from the newest checkpoint in output_dir, in the middle of an epoch too.", False)
    log_every_steps: int = _help("Write loss and learning rate after every so many optimiser steps.", 10)
    report_to: str | None = _help("A tracker that Accelerate knows, such as tensorboard or wandb, or all.")

    def __post_init__(self):
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        for name in ("epochs", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def parse_recipe(classes: list[type], arguments: list[str] | None = None, description: str | None = None) -> tuple:
    """Instances of the dataclasses, from `[recipe.yaml] --flags` (default: the process's command line).

    The first argument may be a YAML file of defaults. Raises ValueError for a file that is missing or holds names
    that are no flags; a required value (without a default) that neither gives, and flags that do not exist, end the
    process with a line that says so, as argparse does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(classes, description=description)
    if arguments and not arguments[0].startswith("-"):
        parser.set_defaults(**_read_yaml(Path(arguments.pop(0)), [f.name for c in classes for f in fields(c)]))
    parsed = parser.parse_args(arguments)
    for c in classes:
        hints = get_type_hints(c)
        for f in fields(c):  # a str that is None by default: it may come from the recipe, but must come
            if hints[f.name] is str and getattr(parsed, f.name) is None:
                parser.error(f"--{f.name} is required, here or in the recipe: {f.metadata['help']}")
    values = vars(parsed)
    return tuple(c(**{f.name: values[f.name] for f in fields(c)}) for c in classes)


def _read_yaml(path: Path, names: list[str]) -> dict:
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; the first argument, if it is no flag, is a YAML file.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names with values, got {type(values).__name__}.")
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            raise ValueError(f"{path}: there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    return values
