"""Classify videos.

    python scripts/predict.py outputs/k400/best clip.mp4 holiday_videos/ --top_k 3

Takes files, folders (searched for videos) and URLs; prints a table, or JSON lines with --json. Broken videos are named,
and then the exit status is 1.
"""

import json
import os
import sys
from dataclasses import dataclass, field

import datasets
import torch
from accelerate import Accelerator
from datasets import Features, Value, Video
from tqdm import tqdm

from hf_inti.data.clips import VideoClips
from hf_inti.data.unlabelled import find_videos
from hf_inti.training.checkpoints import load_classifier, load_processor
from hf_inti.training.cli import parse_arguments, run_script
from hf_inti.training.evaluation import EvalTransform, end_processes, predict_batches, prediction_loader


@dataclass
class PredictionArguments:
    model: str = field(metadata={"help": "A trained model: a folder or a name on the Hub."})
    videos: list[str] = field(metadata={"help": "Files, folders and URLs."})
    top_k: int = field(default=5, metadata={"help": "How many classes to print for each video."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object for each video instead of a table."})
    num_clips: int = field(default=1, metadata={"help": "Clips of each video, whose scores are averaged."})
    num_crops: int = field(default=1, metadata={"help": "Crops of each clip: 1 (centre) or 3."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Videos in each batch; default: 4, on a CPU 1, where more are no faster."}
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that decode while the model computes; default: 1, if the model leaves it a core."},
    )


def free_cores(device: torch.device) -> int:
    """Those that the model does not compute on. Without any it is faster to decode and compute in turn, on all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores - (torch.get_num_threads() if device.type == "cpu" else 1)


def main() -> int:
    args = parse_arguments(PredictionArguments, ["model", "videos"], description=__doc__)
    if args.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {args.top_k}.")
    paths = find_videos(args.videos)
    accelerator = Accelerator()
    batch_size = args.batch_size or (1 if accelerator.device.type == "cpu" else 4)
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = 1 if free_cores(accelerator.device) > 0 else 0
    processor = load_processor(args.model)
    features = Features({"video": Video(decode=False), "label": Value("int64")})
    dataset = datasets.Dataset.from_dict({"video": paths, "label": [-1] * len(paths)}, features=features)
    clips = VideoClips(dataset, EvalTransform(processor, args.num_clips, args.num_crops), on_bad_video="keep")
    loader = prediction_loader(clips, accelerator, batch_size, min(num_workers, len(paths) - 1))
    # While the first videos are decoded.
    model, _ = load_classifier(args.model)
    names = model.config.id2label
    width = max(len(path) for path in paths)
    broken = 0
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for batch in predict_batches(model, loader, accelerator, "Predicting"):
        reasons = batch["bad"]
        scores = batch["logits"].softmax(-1).mean(1)  # (B, K)
        for index, score in zip(batch["index"].tolist(), scores, strict=True):
            path = paths[index]
            if path in reasons:
                broken += 1
                found = {"video": path, "error": reasons[path]}
                line = f"{path:{width}}  BROKEN: {reasons[path]}"
            else:
                best = score.topk(min(args.top_k, len(names)))
                pairs = [(names[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
                found = {"video": path, "predictions": [{"label": name, "score": s} for name, s in pairs]}
                line = f"{path:{width}}  " + "  ".join(f"{name} {s:.1%}" for name, s in pairs)
            if accelerator.is_main_process:
                tqdm.write(json.dumps(found) if args.json else line)  # above the bar
    if broken and accelerator.is_main_process:
        print(f"{broken} of {len(paths)} videos could not be read.", file=sys.stderr)
    end_processes(accelerator)
    return 1 if broken else 0


if __name__ == "__main__":
    run_script(main)
