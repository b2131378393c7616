"""Evaluate a model on a labelled video dataset.

    python scripts/evaluate.py outputs/k400/best --data_dir k400/val.csv --num_clips 4 --num_crops 3
    python scripts/evaluate.py outputs/naive/best --data_dir k400/val.csv --compression tome
    python scripts/evaluate.py outputs/inti/best --data_dir ssv2/val.csv --frame_order shuffled
    python scripts/evaluate.py --host torchvision/swin3d_b --data_dir k400/val.csv --compression sta --num_clips 4

Prints top-1, top-5 and mean class accuracy; writes results.json, predictions.csv, predictions.parquet (one row per
video, with its file) and confusion_matrix.png to output_dir. Unreadable videos count as wrong and are named. Under
torchrun or `accelerate launch` the processes share the work and the answer is the same.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from accelerate import Accelerator

from hf_inti.data.clips import VideoClips
from hf_inti.data.datasets import align_labels, load_video_dataset
from hf_inti.data.layouts import LAYOUTS
from hf_inti.hub.metadata import fingerprint
from hf_inti.training.checkpoints import CompressionOverride, load_classifier
from hf_inti.training.cli import parse_arguments, run_script
from hf_inti.training.evaluation import (
    FRAME_ORDERS,
    EvalTransform,
    end_processes,
    evaluate_loader,
    evaluation_loader,
)
from hf_inti.training.hosts import is_published, split_host
from hf_inti.training.metrics import video_scores
from hf_inti.training.run_info import describe_run
from hf_inti.visualization import confusion_matrix


@dataclass
class EvaluationArguments:
    data_dir: str = field(metadata={"help": "Labelled videos: class folders, list file, tar shards or Hub dataset."})
    model: str | None = field(
        default=None, metadata={"help": "A trained model: a folder (such as best/ or last/) or a name on the Hub."}
    )
    host: str | None = field(
        default=None,
        metadata={"help": "Instead: torchvision/NAME with its published weights, or transformers/CHECKPOINT."},
    )
    host_weights: str | None = field(
        default=None, metadata={"help": "Which of torchvision's published weights; default: the ones it prefers."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where to write; default: evaluation/ in the model's folder, or evaluation_COMPRESSION/, _ORDER/."
        },
    )
    layout: str = field(default="auto", metadata={"help": f"Layout: auto, or one of {', '.join(LAYOUTS)}."})
    split: str = field(default="test", metadata={"help": "Which split, where the dataset has splits."})
    video_root: str | None = field(default=None, metadata={"help": "Where a list's videos lie; default: beside it."})
    allow_outside_root: bool = field(default=False, metadata={"help": "Let a list name videos outside video_root."})
    compression: str | None = field(
        default=None,
        metadata={"help": "Another, without training: tome, sta, linear_pooling or none; on a host sta, tome or none."},
    )
    compression_layers: list[int] | None = field(default=None, metadata={"help": "Its positions, counted from 1."})
    compression_options: dict | None = field(default=None, metadata={"help": "Its options, a mapping (JSON)."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of each clip; default: as in training."})
    sampling: str | None = field(default=None, metadata={"help": "uniform or dense; default: as in training."})
    frame_stride: int | None = field(default=None, metadata={"help": "Distance of frames in dense sampling."})
    resize: int | None = field(
        default=None, metadata={"help": "Short side in pixels to which frames are resized; default: as in training."}
    )
    num_clips: int = field(default=1, metadata={"help": "Clips of each video."})
    num_crops: int = field(default=1, metadata={"help": "Crops of each clip: 1 (centre) or 3."})
    frame_order: str = field(
        default="original", metadata={"help": f"Of the sampled frames: {', '.join(FRAME_ORDERS)} (each video its own)."}
    )
    batch_size: int = field(default=8, metadata={"help": "Videos in each batch of each process."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode, for each evaluating process."})
    mixed_precision: str = field(default="no", metadata={"help": "Numbers to compute with: bf16, fp16, no (float32)."})

    def __post_init__(self):
        if (self.model is None) == (self.host is None):
            raise ValueError(f"either a model or a host must be given, got {self.model!r} and {self.host!r}.")
        if self.host is not None:
            library, name = split_host(self.host)
            self.model = self.host if library == "torchvision" and is_published(self.host) else name
        elif self.host_weights is not None:
            raise ValueError(f"host_weights must be left out without a host, got {self.host_weights!r}.")


def main() -> None:
    args = parse_arguments(EvaluationArguments, ["model"], description=__doc__)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    override = CompressionOverride(args.compression, args.compression_layers, args.compression_options)
    model, processor = load_classifier(args.model, override, args.num_frames, args.host_weights)
    for name in ("sampling", "frame_stride"):
        if getattr(args, name) is not None:
            setattr(processor, name, getattr(args, name))
    if args.resize is not None:
        side = processor.crop_size["height"]
        if args.resize < side:
            raise ValueError(f"resize must be at least {side}, the side of the model's crop, got {args.resize}.")
        processor.size = {"shortest_edge": args.resize}
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    with accelerator.main_process_first():
        dataset = load_video_dataset(
            args.data_dir,
            layout=args.layout,
            split=args.split,
            video_root=args.video_root,
            allow_outside_root=args.allow_outside_root,
        )
        dataset = align_labels(dataset, names)
    transform = EvalTransform(processor, args.num_clips, args.num_crops, args.frame_order)
    clips = VideoClips(dataset, transform, on_bad_video="keep")
    loader = evaluation_loader(clips, accelerator, args.batch_size, args.num_workers)
    metrics, result, bad = evaluate_loader(accelerator.prepare_model(model, evaluation_mode=True), loader, accelerator)
    if accelerator.is_main_process:
        report(args, fingerprint(model), processor, names, dataset, metrics, result, bad)
    end_processes(accelerator)


def report(args, model_fingerprint, processor, names, dataset, metrics, result, bad) -> None:
    """Write and print what `evaluate_loader` found."""
    parent = Path(args.model) if Path(args.model).is_dir() else Path()
    # Not where the results of the model as it was trained are.
    order = None if args.frame_order == "original" else args.frame_order
    name = "_".join(filter(None, ["evaluation", args.compression, order]))
    output_dir = Path(args.output_dir or parent / name)
    output_dir.mkdir(parents=True, exist_ok=True)
    views = result["logits"].shape[1]
    _, scores = video_scores(result["logits"].flatten(0, 1), result["index"].repeat_interleave(views))
    best = (-scores).argsort(axis=1, kind="stable")[:, :5]
    ok = result["ok"].tolist()
    table = datasets.Dataset.from_dict(
        {
            "video": [dataset[i]["video"]["path"] or f"item {i}" for i in result["index"].tolist()],
            "label": [names[i] for i in result["labels"].tolist()],
            "prediction": [names[row[0]] if good else None for row, good in zip(best, ok, strict=True)],
            "score": [s[row[0]] if good else None for s, row, good in zip(scores, best, ok, strict=True)],
            "top5": ["|".join(names[i] for i in row) if good else "" for row, good in zip(best, ok, strict=True)],
        }
    )
    table.to_csv(str(output_dir / "predictions.csv"))
    table.to_parquet(str(output_dir / "predictions.parquet"))
    confusion_matrix(metrics["confusion_matrix"], names, output_dir / "confusion_matrix.png")
    protocol = {"frames": processor.num_frames, "crops": args.num_crops, "clips": args.num_clips}
    run = describe_run(args, protocol=protocol, dataset=args.data_dir, fingerprint=model_fingerprint)
    results = {**metrics, **run, "bad_videos": bad.reasons}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if len(bad):
        print(bad.report() + " (counted as wrong)")
    print(
        f"{metrics['num_videos']} videos, views {processor.num_frames}x{args.num_crops}x{args.num_clips}: "
        f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, mean class {metrics['mean_class_accuracy']:.2%}"
    )
    print(f"Predictions and the confusion matrix are in {output_dir}")


if __name__ == "__main__":
    run_script(main)
