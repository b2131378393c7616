"""What a training loop needs besides Accelerate: clips, optimiser, and files that survive an interruption."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import get_scheduler

from .augmentation import ClipAugmentation
from .recipes import DataArguments, TrainingArguments
from .video_processing_inti_clip import InTIClipVideoProcessor


NEW_MODULES = ("compression.", "adaptation.", "classifier.")  # what a CLIP checkpoint does not have


class TrainingClip:
    """One randomly sampled and augmented clip: (video, generator, label) -> uint8 pixel_values (T, 3, H, W), labels."""

    def __init__(self, processor: InTIClipVideoProcessor, augmentation: ClipAugmentation, resize: int):
        self.processor, self.augmentation, self.size = processor, augmentation, {"shortest_edge": resize}

    def __call__(self, video, generator: torch.Generator, label: int) -> dict:
        frames = self.processor.load_frames(video, generator=generator, size=self.size)
        frames, label = self.augmentation(frames, label, generator)
        return {"pixel_values": frames, "labels": label}


class AllFrames:
    """Every frame of a video with its short side resized, for `cache_frames`: video -> uint8 (T, 3, h, w)."""

    def __init__(self, processor: InTIClipVideoProcessor, resize: int):
        self.processor, self.size = processor, {"shortest_edge": resize}

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
        raise ValueError(f"flip_label_map names the class {label!r}, which is not among the {len(label_names)} classes.")

    swaps = {number(a): number(b) for a, b in data.flip_label_map.items()}
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


def parameter_groups(model: nn.Module, training: TrainingArguments) -> list[dict]:
    """AdamW's groups: new modules learn faster by the recipe's factor, biases and norms (1-d) may go undecayed."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            new = name.removeprefix("vision_model.").startswith(NEW_MODULES)
            decayed = parameter.dim() > 1 or training.decay_norms_and_biases
            groups.setdefault((new, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": training.learning_rate * (training.new_module_lr_multiplier if new else 1.0),
            "weight_decay": training.weight_decay if decayed else 0.0,
        }
        for (new, decayed), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, training: TrainingArguments, steps_per_epoch: int, total_steps: int):
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
    """Metrics as JSON lines; on resuming, lines of steps that will be made again are dropped."""

    def __init__(self, path: Path, resumed_at: int = 0):
        self.path = path
        kept = []
        if path.exists() and resumed_at:
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while writing it
        path.write_text("".join(kept))

    def write(self, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def describe_run(*arguments, **more) -> dict:
    """All that a run decided, for `run.json`."""
    packages = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "av", "kornia")
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # installed from a wheel
    return {
        "command": sys.argv,
        "arguments": {type(a).__name__: asdict(a) for a in arguments},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "commit": commit,
        **more,
    }
