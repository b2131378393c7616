"""What a training run is built from, given its arguments: datasets, model, processor, loaders, optimizer."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, get_scheduler, logging

from ..data.augmentation import ClipAugmentation
from ..data.clips import StreamingVideoClips, VideoClips, cache_frames, collate
from ..data.datasets import align_labels, label_names_of, load_video_dataset
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .evaluation import EvalTransform
from .hosts import build_host, host_processor
from .interruption import ignore_signals
from .weights import load_weights


def load_datasets(
    data: DataArguments, accelerator: Accelerator
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training videos and, if there are any, the evaluation videos with the same label numbers."""
    place = {"video_root": data.video_root, "allow_outside_root": data.allow_outside_root}
    load = partial(load_video_dataset, layout=data.layout, **place)
    with accelerator.main_process_first():
        train_set = load(data.train_dir, split=data.train_split, streaming=data.streaming)
        eval_set = data.eval_dir and load(data.eval_dir, split=data.eval_split)
        return train_set, eval_set and align_labels(eval_set, label_names_of(train_set))


# Model and processor ------------------------------------------------------------------------------


def build_model(arguments: ModelArguments, label_names: list[str]) -> PreTrainedModel:
    """A host, or a CLIP or InTI-CLIP checkpoint, with a head for `label_names`, new where it has none of that shape.

    Raises ValueError if weights of CLIP's tower are missing from the checkpoint.
    """
    if arguments.host is not None:
        return build_host(arguments, label_names)
    options = {
        **arguments.config_options(),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }
    if is_inti_clip(arguments.model):
        values, _ = InTIClipVisionConfig.get_config_dict(arguments.model)
        config = InTIClipVisionConfig.from_dict({**values, **options})
    else:
        config = InTIClipVisionConfig.from_clip(arguments.model, **options)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list every parameter that is absent from CLIP
    model, report = load_weights(
        InTIClipForVideoClassification,
        arguments.model,
        config=config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    logging.set_verbosity(verbosity)
    absent = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    lacking = sorted(name for name in absent if module_kind(name) == "tower")
    if lacking:
        raise ValueError(
            f"{arguments.model} must hold {lacking[0]} in the shape that its config.json says, got none; "
            "give a CLIP or InTI-CLIP checkpoint."
        )
    if arguments.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def build_processor(model: str, config: PreTrainedConfig, data: DataArguments) -> InTIClipVideoProcessor:
    """The processor with which the model is trained and saved.

    An InTI-CLIP checkpoint or a host keeps its own, changed only in what `data` sets; for CLIP the rest are CLIP's.
    The number of frames is always the model's.
    """
    names = ("sampling", "frame_stride", "image_mean", "image_std")
    options = {name: getattr(data, name) for name in names if getattr(data, name) is not None}
    if not isinstance(config, InTIClipVisionConfig):
        if data.squash is not None:
            options["size"] = frame_size(host_processor(model, config).crop_size["height"], data.squash)
        return host_processor(model, config, **options)
    options["num_frames"] = config.num_frames
    if data.squash is not None:
        options["size"] = frame_size(config.image_size, data.squash)
    if is_inti_clip(model):
        try:
            return InTIClipVideoProcessor.from_pretrained(model, **options)
        except OSError as error:
            raise ValueError(
                f"{model} must hold a video processor, got none ({' '.join(str(error).split())}); save one there with "
                "InTIClipVideoProcessor.save_pretrained."
            ) from error
    side = config.image_size
    size = {"size": frame_size(side, squash=False), "crop_size": {"height": side, "width": side}}
    return InTIClipVideoProcessor(**{**size, **options})


def is_inti_clip(model: str) -> bool:
    """Whether a checkpoint (a folder or a name on the Hub) is one of this package, not CLIP's."""
    values, _ = InTIClipVisionConfig.get_config_dict(model)
    return values.get("model_type") == InTIClipVisionConfig.model_type


def frame_size(pixels: int, squash: bool) -> dict[str, int]:
    """The processor's `size`: the short side, or both sides where frames are squashed to a square."""
    return {"height": pixels, "width": pixels} if squash else {"shortest_edge": pixels}


# Clips and their loader ---------------------------------------------------------------------------


class TrainTransform:
    """One randomly sampled and augmented clip: (video, generator, label) -> uint8 `frames` (T, 3, H, W), `labels`."""

    def __init__(self, processor: InTIClipVideoProcessor, augmentation: ClipAugmentation, size: dict[str, int]):
        self.processor, self.augmentation, self.size = processor, augmentation, size

    def __call__(self, video, generator: torch.Generator, label: int) -> dict:
        frames = self.processor.load_frames(video, generator=generator, size=self.size)
        frames, label = self.augmentation(frames, label, generator)
        return {"frames": frames, "labels": label}


class AllFrames:
    """Every frame of a video, resized, for `cache_frames`: video -> uint8 (T, 3, h, w)."""

    def __init__(self, processor: InTIClipVideoProcessor, size: dict[str, int]):
        self.processor, self.size = processor, size

    def __call__(self, video) -> torch.Tensor:
        return self.processor.load_frames(video, do_sample_frames=False, size=self.size)


def build_augmentation(data: DataArguments, crop_size: int, label_names: list[str]) -> ClipAugmentation:
    """The augmentation that `data` describes, with `flip_label_map` in numbers and in both directions.

    Raises ValueError for a bad option or an unknown class.
    """

    def number(label: str) -> int:
        if str(label) in label_names:
            return label_names.index(str(label))
        if str(label).isdigit() and int(label) < len(label_names):
            return int(label)
        raise ValueError(f"flip_label_map must hold names or numbers of the {len(label_names)} classes, got {label!r}.")

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
    train_set: Dataset | IterableDataset,
    eval_set: Dataset | None,
    accelerator: Accelerator,
) -> tuple[VideoClips | StreamingVideoClips, VideoClips | None]:
    """Training clips and, if there are evaluation videos, one evaluation clip of each."""
    squash = "shortest_edge" not in processor.size
    size = frame_size(data.resize or processor.crop_size["height"], squash)
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


def training_loader(
    clips: VideoClips | StreamingVideoClips, data: DataArguments, training: TrainingArguments, accelerator: Accelerator
) -> DataLoader:
    """Shuffled batches of `collate`, split among the processes."""
    whole_batches = not data.streaming and len(clips) >= training.batch_size * accelerator.num_processes
    loader = DataLoader(
        clips,
        batch_size=training.batch_size,
        shuffle=None if data.streaming else True,
        drop_last=whole_batches,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(training.seed),  # not the global one, which is seeded for every batch
    )
    # StreamingVideoClips splits its stream among the processes itself.
    return loader if data.streaming else accelerator.prepare_data_loader(loader)


def batches_of_all(loader: DataLoader, accelerator: Accelerator) -> Iterator[dict]:
    """Batches of a stream for as long as every process has one.

    The processes' shares of a stream differ in length. A process that ran out would wait in the evaluation for the
    others, and they would wait for it in the next step.
    """
    iterator = iter(loader)
    while True:
        batch = next(iterator, None)
        have = torch.tensor(float(batch is not None), device=accelerator.device)
        if accelerator.reduce(have, "sum").item() < accelerator.num_processes:
            return
        yield batch


# Optimizer ----------------------------------------------------------------------------------------


def module_kind(name: str) -> str:
    """Where a parameter of InTIClipForVideoClassification or a host belongs, by its name.

    "head" is the classifier, "new" compression and adaptation, "tower" everything that CLIP, or the host, has.
    """
    if name.startswith(("classifier.", "host.head.")):
        return "head"
    name = name.removeprefix("vision_model.").removeprefix("host.")
    return "new" if name.startswith(("compression.", "adaptation.")) else "tower"


def parameter_groups(model: nn.Module, training: TrainingArguments) -> list[dict]:
    """AdamW's parameter groups: one per kind of module and decayed or not.

    The learning rate of new modules and of the head is multiplied by a factor of its own. Biases and norms (all
    parameters with at most one axis) have no weight decay unless `decay_norms_and_biases`.
    """
    multipliers = {"tower": 1.0, "new": training.new_module_lr_multiplier, "head": training.head_lr_multiplier}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 or training.decay_norms_and_biases
            groups.setdefault((module_kind(name), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": training.learning_rate * multipliers[kind],
            "weight_decay": training.weight_decay if decayed else 0.0,
        }
        for (kind, decayed), parameters in groups.items()
    ]


def count_steps(loader: DataLoader, data: DataArguments, training: TrainingArguments) -> tuple[float, int]:
    """Optimizer steps per epoch, and in all.

    A stream's length is unknown: `max_steps` then covers all epochs, so that warm-up is a share of them.
    """
    if data.streaming:
        return training.max_steps / training.epochs, training.max_steps
    steps_per_epoch = math.ceil(len(loader) / training.gradient_accumulation_steps)
    return steps_per_epoch, training.max_steps or training.epochs * steps_per_epoch


def build_optimizer(
    model: nn.Module, training: TrainingArguments, steps_per_epoch: float, total_steps: int
) -> tuple[AdamW, LRScheduler]:
    """AdamW, and a schedule per optimizer step: linear warm-up from 0, then a cosine to `min_lr_ratio`."""
    optimizer = AdamW(
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
