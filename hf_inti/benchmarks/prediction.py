"""scripts/predict.py on many videos, compared with decoding alone and the model alone."""

import functools
import runpy
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from ..data.layouts import VIDEO_EXTENSIONS
from ..measure.jobs import ROOT, Job, read_json, run_jobs, write_json
from ..measure.timing import TimingArguments, report, summary
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from ..training import evaluation
from ..training.cli import parse_recipe, run_script
from .decoding import ENCODED_SECONDS, make_clip
from .models import build


# What of scripts/predict.py a run does; the rest is done at once.
HALVES = {"predict": ("decoding", "model"), "decoding": ("decoding",), "model": ("model",), "start": ()}


def predict_halves(output: Path, halves: list[str], arguments: list[str]) -> None:
    """In a process of its own: run scripts/predict.py with these arguments, and write its `seconds`.

    Without "decoding" all clips are one that is there already, in the process of the model; without "model" all logits
    are 0. All else, starting up included, is the same. What Python and torch take to start is not counted.
    """
    if "model" not in halves:

        def at_once(self, pixel_values):
            return SimpleNamespace(logits=torch.zeros(len(pixel_values), self.config.num_labels))

        InTIClipForVideoClassification.forward = at_once
    if "decoding" not in halves:
        collate, blank = evaluation.collate, functools.cache(lambda self: self.blank()["pixel_values"])

        @functools.cache
        def stacked(clip: torch.Tensor, count: int) -> torch.Tensor:
            return torch.stack([clip] * count)

        def collate_at_once(items: list[dict]) -> dict:
            pixel_values = stacked(items[0]["pixel_values"], len(items))
            small = [{**item, "pixel_values": torch.empty(0)} for item in items]
            return {**collate(small), "pixel_values": pixel_values}

        evaluation.EvalTransform.__call__ = lambda self, video, generator=None: {"pixel_values": blank(self)}
        evaluation.collate = collate_at_once
        arguments = [*arguments, "--num_workers", "0"]
    sys.argv = [str(ROOT / "scripts" / "predict.py"), *arguments]
    begin = time.perf_counter()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    write_json(output, {"seconds": time.perf_counter() - begin})


def measure_prediction(model: str, videos: Path, repetitions: int, threads: int, folder: Path) -> dict[str, dict]:
    """Rows `predict`, `decoding`, `model` and `start`: scripts/predict.py whole and in halves, in turns.

    All four have the same start: imports, loading the model, starting the worker. `predict` also has `of_slower`, its
    time as a share of the slower half's, and `of_slower_begun`, both less the start.
    """
    jobs = []
    for n in range(repetitions):
        for name, halves in HALVES.items():
            output = folder / f"{name}_{n}.json"
            output.unlink(missing_ok=True)
            arguments = ["hf_inti.benchmarks.prediction", str(output), ",".join(halves), model, str(videos)]
            jobs.append(Job(f"{name} {n + 1}", arguments, folder / "predict_log.txt", output))
    run_jobs(jobs, 1, threads, "Predicting", lambda job, _: f"{job.name}: {read_json(job.output)['seconds']:.1f} s")
    rows = {}
    for name in HALVES:
        rows[name] = summary([read_json(folder / f"{name}_{n}.json")["seconds"] for n in range(repetitions)])
    whole, start = rows["predict"]["seconds"], rows["start"]["seconds"]
    slower = max(rows["decoding"]["seconds"], rows["model"]["seconds"])
    rows["predict"] |= {"of_slower": whole / slower, "of_slower_begun": (whole - start) / (slower - start)}
    return rows


@dataclass
class PredictionArguments(TimingArguments):
    """What is predicted."""

    model: str | None = field(
        default=None, metadata={"help": "A trained model: a folder; default: InTI-B, 5 and 7, with random weights."}
    )
    videos: str | None = field(default=None, metadata={"help": "A folder of videos; default: generated ones."})
    num_videos: int = field(default=100, metadata={"help": "How many are made, of 10 seconds and 340 x 256."})


def prepare(args: PredictionArguments, scratch: Path) -> tuple[str, Path]:
    """The model and the folder of videos that were given, or ones made in `scratch`."""
    model, videos = args.model or str(scratch / "model"), Path(args.videos or scratch / "videos")
    if args.videos is None:
        videos.mkdir()
        first = make_clip(videos / "000.mp4", ENCODED_SECONDS, 340, 256, 250)
        for n in range(1, args.num_videos):
            (videos / f"{n:03d}.mp4").write_bytes(first.read_bytes())
    if args.model is None:
        build({"size": "B/16", "compression_layers": [5, 7]}).save_pretrained(model)
        InTIClipVideoProcessor().save_pretrained(model)
    return model, videos


def main(arguments: list[str]) -> int:
    """`benchmark.py prediction`. Raises ValueError for settings that do not fit and for a run that failed."""
    args = parse_recipe([PredictionArguments], arguments, description=__doc__)[0]
    args.pin_threads()
    with tempfile.TemporaryDirectory() as scratch:
        model, videos = prepare(args, Path(scratch))
        count = sum(path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS for path in videos.rglob("*"))
        rows = measure_prediction(model, videos, args.repetitions, torch.get_num_threads(), Path(scratch))
    about = (
        f"scripts/predict.py on {count} videos, its decoding alone (logits at once), its model alone (clips at once) "
        f"and neither (its start, which is part of all): it takes {rows['predict']['of_slower']:.2f} times the slower "
        f"half, {rows['predict']['of_slower_begun']:.2f} times without the start."
    )
    return report("Prediction", rows, args, about)


if __name__ == "__main__":  # as measure_prediction starts it
    target, parts, *rest = sys.argv[1:]
    run_script(lambda: predict_halves(Path(target), parts.split(","), rest))
