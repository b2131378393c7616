"""Class scores or features of many videos, into Parquet shards, on one machine or a cluster.

    python scripts/bulk.py outputs/k400/best videos/ more.parquet shards/ --output_dir features --output features
    python scripts/bulk.py outputs/k400/best list.txt --output_dir scores --ray_address auto

Takes files, folders, URLs, lists (txt, csv, json, jsonl, Parquet) and tar shards. Run again, after an interruption or
with more videos, it computes what is not in --output_dir yet. A broken video is a row with its reason.
"""

import sys
from dataclasses import dataclass, field

from hf_inti.bulk.engine import cluster, import_ray, make_plan
from hf_inti.bulk.model import PRECISIONS, Result
from hf_inti.bulk.run import fill, retry_broken, settings_of, stages_of
from hf_inti.bulk.shards import Shards
from hf_inti.data.clips import BadVideos
from hf_inti.data.unlabelled import find_clips
from hf_inti.training.checkpoints import load_classifier
from hf_inti.training.cli import parse_arguments, run_script


OUTPUTS = ("scores", "features")


@dataclass
class BulkArguments:
    model: str = field(metadata={"help": "A trained model: a folder or a name on the Hub."})
    videos: list[str] = field(metadata={"help": "Files, folders, URLs, lists and tar shards."})
    output_dir: str = field(metadata={"help": "Folder of the shards, of this run and those before it."})
    output: str = field(
        default="scores", metadata={"help": "scores (softmax), or features (what the classifier reads)."}
    )
    video_column: str = field(default="video", metadata={"help": "The column of lists with paths or URLs."})
    video_root: str | None = field(default=None, metadata={"help": "Where a list's videos lie; default: beside it."})
    allow_outside_root: bool = field(default=False, metadata={"help": "Let lists name files outside video_root."})
    num_clips: int = field(default=1, metadata={"help": "Clips of each video, whose outputs are averaged."})
    num_crops: int = field(default=1, metadata={"help": "Crops of each clip: 1 (centre) or 3."})
    batch_size: int | None = field(default=None, metadata={"help": "Videos in each batch; default: 8, on a CPU 1."})
    mixed_precision: str = field(default="no", metadata={"help": "Numbers to compute with: bf16, fp16, no (float32)."})
    models: int | None = field(
        default=None, metadata={"help": "Processes with a model; default: one on each GPU, else on each machine."}
    )
    decoders: int | None = field(
        default=None, metadata={"help": "Processes that decode, at most; default: free cores."}
    )
    shard_rows: int = field(default=10_000, metadata={"help": "Videos in each shard; fewer after 5 minutes."})
    retry_broken: bool = field(
        default=False, metadata={"help": "Try again those of these videos that are broken in output_dir."}
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Of a running Ray cluster, such as auto; default: this machine alone."}
    )

    def __post_init__(self):
        for name, known in (("output", OUTPUTS), ("mixed_precision", tuple(PRECISIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("num_clips", "batch_size", "models", "decoders", "shard_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_crops not in (1, 3):
            raise ValueError(f"num_crops must be 1 or 3, got {self.num_crops}.")


def main() -> None:
    args = parse_arguments(BulkArguments, ["model", "videos"], description=__doc__)
    import_ray()  # before all that takes time
    model, processor = load_classifier(args.model)
    clips = find_clips(args.videos, args.video_column, args.video_root, args.allow_outside_root)
    scores = args.output == "scores"
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    size = len(labels) if scores else model.classifier.in_features
    views = (args.num_clips, args.num_crops, args.mixed_precision)
    result = Result(args.output, size, labels if scores else (), *views)
    settings = settings_of(model, processor, result)
    with Shards(args.output_dir, result.schema(), settings, args.shard_rows) as shards:
        if args.retry_broken:
            retry_broken(shards, clips)
        if any(clip.video not in shards.done for clip in clips):
            with cluster(args.ray_address) as resources:
                plan = make_plan(resources, args.models, args.decoders, args.batch_size)
                fill(shards, clips, stages_of(model, processor, result, plan), plan)
    report(args.output_dir, [clip.video for clip in clips], shards.done)


def report(output_dir: str, videos: list[str], done: dict[str, str | None]) -> None:
    bad = BadVideos()
    bad.add({video: done[video] for video in videos if done[video] is not None})
    if len(bad):
        print(bad.report(), file=sys.stderr)
    print(f"{len(videos)} videos are in {output_dir}, {len(bad)} of them broken")


if __name__ == "__main__":
    run_script(main)
