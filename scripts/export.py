"""Export a trained model to ONNX, to int8 ONNX, or to a program of torch.export.

    python scripts/export.py outputs/k400/best exported --int8 true --evaluate_dir k400/val.csv

Writes model.onnx, model_int8.onnx or model.pt2 to OUTPUT_DIR, and the processor beside them. They take any number of
clips, and each holds labels, frames, size and normalisation as metadata. Each file is loaded again and compared with
the model on random clips (int8, which is meant to differ, is only reported).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from hf_inti.data.clips import VideoClips
from hf_inti.data.datasets import align_labels, load_video_dataset
from hf_inti.data.layouts import LAYOUTS
from hf_inti.export import (
    ExportedModel,
    check_exported,
    export_onnx,
    export_program,
    file_size,
    frame_counts,
    largest_difference,
    needs,
    quantize_onnx,
)
from hf_inti.training.cli import parse_arguments, run_script
from hf_inti.training.evaluation import EvalTransform, evaluate_loader, evaluation_loader
from hf_inti.training.weights import load_weights


EXPORTERS = {"onnx": export_onnx, "pt2": export_program}


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "A trained model: a folder or a name on the Hub."})
    output_dir: str = field(metadata={"help": "Folder to write to."})
    formats: list[str] = field(
        default_factory=lambda: ["onnx"], metadata={"help": "onnx, pt2 (a program of torch.export), or both."}
    )
    dynamic_frames: bool = field(
        default=False, metadata={"help": "Take other numbers of frames than the model's, from a least one on."}
    )
    int8: bool = field(default=False, metadata={"help": "Also write model_int8.onnx, with int8 weights."})
    evaluate_dir: str | None = field(
        default=None, metadata={"help": "Labelled videos: top-1 of the model and of each file, one view of each video."}
    )
    layout: str = field(default="auto", metadata={"help": f"Their layout: auto, or one of {', '.join(LAYOUTS)}."})
    split: str = field(default="test", metadata={"help": "Which split, where they have splits."})
    video_root: str | None = field(default=None, metadata={"help": "Where a list's videos lie; default: beside it."})
    allow_outside_root: bool = field(default=False, metadata={"help": "Let a list name videos outside video_root."})
    batch_size: int = field(default=8, metadata={"help": "Videos in each batch of the evaluation."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode in the evaluation."})

    def __post_init__(self):
        if unknown := [name for name in self.formats if name not in EXPORTERS]:
            raise ValueError(f"formats must be out of {', '.join(EXPORTERS)}, got {unknown[0]!r}.")
        if self.int8 and "onnx" not in self.formats:
            raise ValueError("int8 is made of the ONNX file; add onnx to the formats.")


def main() -> None:
    args = parse_arguments(ExportArguments, ["model", "output_dir"], description=__doc__)
    if "onnx" in args.formats:  # before anything that takes long
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needs(package)
    model = load_weights(InTIClipForVideoClassification, args.model, dtype=torch.float32).eval()
    processor = InTIClipVideoProcessor.from_pretrained(args.model)
    if args.dynamic_frames:
        frame_counts(model)
    dataset = None
    if args.evaluate_dir is not None:
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        dataset = load_video_dataset(
            args.evaluate_dir,
            layout=args.layout,
            split=args.split,
            video_root=args.video_root,
            allow_outside_root=args.allow_outside_root,
        )
        dataset = align_labels(dataset, names)
    output_dir = Path(args.output_dir)
    processor.save_pretrained(output_dir)
    paths = []
    for name in args.formats:
        path = output_dir / f"model.{name}"
        EXPORTERS[name](model, path, args.dynamic_frames, processor)
        difference = check_exported(model, path, args.dynamic_frames)
        print(f"{path}: {megabytes(file_size(path))}, logits within {difference:.1e} of the model's")
        paths.append(path)
    if args.int8:
        path = output_dir / "model_int8.onnx"
        quantize_onnx(output_dir / "model.onnx", path)
        difference = largest_difference(model, ExportedModel(path), args.dynamic_frames)
        print(f"{path}: {megabytes(file_size(path))}, logits of random clips differ by up to {difference:.1e}")
        paths.append(path)
    if dataset is not None:
        accelerator = Accelerator(cpu=True)
        clips = VideoClips(dataset, EvalTransform(processor), on_bad_video="keep")
        loader = evaluation_loader(clips, accelerator, args.batch_size, args.num_workers)
        for name, one in [("the model", model), *((path.name, ExportedModel(path)) for path in paths)]:
            metrics, _, bad = evaluate_loader(one, loader, accelerator)
            print(f"{name}: top-1 {metrics['top1']:.2%} of {metrics['num_videos']} videos")
        if len(bad):
            print(bad.report() + " (counted as wrong)")


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    run_script(main)
