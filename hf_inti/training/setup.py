"""What a training loop needs besides Accelerate: clips, optimiser, and files that survive an interruption."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_scheduler, logging

from ..data.augmentation import ClipAugmentation
from ..data.clips import StreamingVideoClips, VideoClips, cache_frames
from ..data.datasets import label_names_of
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .evaluation import EvalTransform


NEW_MODULES = ("compression.", "adaptation.", "classifier.")  # what a CLIP checkpoint does not have


def build_model(arguments: ModelArguments, label_names: list[str]) -> InTIClipForVideoClassification:
    """The model with a new head, from CLIP or InTI-CLIP; what that lacks of CLIP's tower is a ValueError."""
    options = {
        **arguments.config_options(),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }
    values, _ = InTIClipVisionConfig.get_config_dict(arguments.model)
    if values.get("model_type") == InTIClipVisionConfig.model_type:
        config = InTIClipVisionConfig.from_dict({**values, **options})
    else:
        config = InTIClipVisionConfig.from_clip(arguments.model, **options)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # new modules are missing from any CLIP checkpoint: 40 lines that say nothing
    model, report = InTIClipForVideoClassification.from_pretrained(
        arguments.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    logging.set_verbosity(verbosity)
    absent = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    lacking = sorted(name for name in absent if not is_new(name))
    if lacking:
        raise ValueError(f"{arguments.model} has no {lacking[0]} of this shape; is it CLIP's vision tower?")
    if arguments.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def is_new(name: str) -> bool:
    """Whether a parameter of InTIClipForVideoClassification is of a module that CLIP does not have."""
    return name.removeprefix("vision_model.").startswith(NEW_MODULES)


def frame_size(pixels: int, squash: bool) -> dict[str, int]:
    """The processor's `size`: the short side, or both where frames are squeezed to a square."""
    return {"height": pixels, "width": pixels} if squash else {"shortest_edge": pixels}


class TrainTransform:
    """One randomly sampled and augmented clip: (video, generator, label) -> uint8 pixel_values (T, 3, H, W), labels."""

    def __init__(self, processor: InTIClipVideoProcessor, augmentation: ClipAugmentation, size: dict):
        self.processor, self.augmentation, self.size = processor, augmentation, size

    def __call__(self, video, generator: torch.Generator, label: int) -> dict:
        frames = self.processor.load_frames(video, generator=generator, size=self.size)
        frames, label = self.augmentation(frames, label, generator)
        return {"pixel_values": frames, "labels": label}


class AllFrames:
    """Every frame of a video, resized, for `cache_frames`: video -> uint8 (T, 3, h, w)."""

    def __init__(self, processor: InTIClipVideoProcessor, size: dict):
        self.processor, self.size = processor, size

    def __call__(self, video) -> torch.Tensor:
        return self.processor.load_frames(video, do_sample_frames=False, size=self.size)


def build_augmentation(data: DataArguments, crop_size: int, label_names: list[str]) -> ClipAugmentation:
    """The recipe's augmentation; the classes that a flip swaps may be given by name or number.

    Raises ValueError for a bad option or an unknown class.
    """

    def number(label) -> int:
        if str(label) in label_names:
            return label_names.index(str(label))
        if str(label).isdigit() and int(label) < len(label_names):
            return int(label)
        raise ValueError(f"flip_label_map names {label!r}, which is not among the {len(label_names)} classes.")

    swaps = {number(a): number(b) for a, b in (data.flip_label_map or {}).items()}
    return ClipAugmentation(
        crop_size=crop_size,
        crop=data.crop,
        area=tuple(data.crop_area),
        flip=data.flip,
        flip_label_map={**swaps, **{b: a for a, b in swaps.items()}} or None,
        color_jitter_prob=data.color_jitter_prob,
        grayscale_prob=data.grayscale_prob,
        rand_augment=data.rand_augment,
        random_erasing_prob=data.random_erasing_prob,
    )


def build_clips(
    data: DataArguments,
    training: TrainingArguments,
    processor: InTIClipVideoProcessor,
    train_set,
    eval_set,
    accelerator: Accelerator,
) -> tuple[VideoClips | StreamingVideoClips, VideoClips | None]:
    """Training clips and, where there is an evaluation set, evaluation clips (one view)."""
    size = frame_size(data.resize or processor.crop_size["height"], data.squash)
    label_names = label_names_of(train_set)
    if data.cache_frames:
        with accelerator.main_process_first():
            train_set = cache_frames(train_set, AllFrames(processor, size))
            eval_set = eval_set and cache_frames(eval_set, AllFrames(processor, dict(processor.size)))
    augmentation = build_augmentation(data, processor.crop_size["height"], label_names)
    shared = {"seed": training.seed, "repeats": data.repeats, "with_label": True}
    transform = TrainTransform(processor, augmentation, size)
    if data.streaming:
        place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        train_clips = StreamingVideoClips(train_set, transform, shuffle_buffer=1000, **place, **shared)
    else:
        train_clips = VideoClips(train_set, transform, on_bad_video=data.on_bad_video, **shared)
    return train_clips, eval_set and VideoClips(eval_set, EvalTransform(processor), on_bad_video="keep")


def parameter_groups(model: nn.Module, training: TrainingArguments) -> list[dict]:
    """AdamW's groups: new modules learn faster by the recipe's factor, biases and norms (1-d) may go undecayed."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 or training.decay_norms_and_biases
            groups.setdefault((is_new(name), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": training.learning_rate * (training.new_module_lr_multiplier if new else 1.0),
            "weight_decay": training.weight_decay if decayed else 0.0,
        }
        for (new, decayed), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, training: TrainingArguments, steps_per_epoch: float, total_steps: int):
    """AdamW, and a schedule per optimiser step: linear warm-up from 0, then a cosine to `min_lr_ratio`."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training),
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=math.ceil(training.warmup_epochs * steps_per_epoch),
        num_training_steps=total_steps,
        scheduler_specific_kwargs={"min_lr_rate": training.min_lr_ratio},
    )
    return optimizer, scheduler


def replace_folder(finished: Path, target: Path) -> None:
    """Put a finished folder in the place of `target`, so that an interruption leaves the old or the new one whole."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(finished, target)
    shutil.rmtree(old, ignore_errors=True)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps; a half-written one has another name."""
    found = [p for p in (output_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)


class MetricsLog:
    """Metrics as JSON lines; on resuming, what was written after the checkpoint is dropped: it will come again."""

    def __init__(self, path: Path, size: int = 0):
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self.path = path

    def write(self, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    @property
    def size(self) -> int:
        """In bytes, for the checkpoint."""
        return self.path.stat().st_size


def batches_of_all(loader: DataLoader, accelerator: Accelerator) -> Iterator[dict]:
    """Batches of a stream for as long as every process has one.

    Their shares end at different times; without this the first to end would wait for the others in the evaluation,
    and they for it in the next step.
    """
    iterator = iter(loader)
    while True:
        batch = next(iterator, None)
        have = torch.tensor(float(batch is not None), device=accelerator.device)
        if accelerator.reduce(have, "sum").item() < accelerator.num_processes:
            return
        yield batch


def describe_run(*arguments, **more) -> dict:
    """All that a run decided, for `run.json`."""
    packages = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "av", "kornia")
    return {
        "command": sys.argv,
        "arguments": {type(a).__name__: asdict(a) for a in arguments},
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in packages}},
        "commit": _commit(),
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed from a wheel, perhaps below some other repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# Settings that may change when a run is resumed: they decide where and how fast it runs, not what comes out.
FREE_SETTINGS = {
    "activation_checkpointing",
    "checkpoint_every_epochs",
    "checkpoint_every_steps",
    "eval_batch_size",
    "hub_private",
    "log_every_steps",
    "num_workers",
    "on_bad_video",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume",
}


def check_same_run(before: dict, now: dict) -> None:
    """Raise a ValueError that names the first setting in which two `describe_run` differ, as JSON sees them."""

    def decisive(run: dict) -> dict:
        settings = {name: value for part in run["arguments"].values() for name, value in part.items()}
        settings = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
        return {**settings, **{name: run[name] for name in ("num_processes", "train_fingerprint", "eval_fingerprint")}}

    before, now = decisive(before), decisive(json.loads(json.dumps(now)))
    for name, value in now.items():
        if value != before.get(name):
            raise ValueError(
                f"cannot resume with {name} = {value!r}: the run began with {before.get(name)!r}; "
                "give that, or begin another run in another --output_dir."
            )
