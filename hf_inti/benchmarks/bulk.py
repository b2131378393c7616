"""The stages of scripts/bulk.py together, beside each alone; with a model that takes no time, and with slow ones."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ..bulk.engine import Plan, Stage, cluster, make_plan, run_stages
from ..bulk.isolation import Isolated
from ..bulk.model import ClipModel, Result, make_table
from ..bulk.run import stages_of
from ..data.unlabelled import Clip, find_clips
from ..measure.timing import report, summary
from ..training.checkpoints import load_classifier
from ..training.cli import parse_recipe
from .prediction import PredictionArguments, prepare


ACTORS = (1, 2, 4)
REPEATED = 20


class BlankDecoder:
    """Frames at once."""

    def __call__(self, clip: dict) -> dict:
        return {"video": clip["video"], "error": None, "frames": b"\0" * 1000, "shape": [1000]}


class SlowModel:
    """Sleeps, as a GPU computes: without this processor."""

    def __init__(self, result: Result, seconds: float):
        self.result, self.seconds = result, seconds

    def __call__(self, views: pa.Table) -> pa.Table:
        time.sleep(self.seconds * len(views))
        found = np.zeros((len(views), self.result.size), dtype=np.float32)
        return make_table(views["video"], views["error"], found, self.result)


def time_stages(clips: Sequence[Clip], stages: tuple[Stage, Stage], plan: Plan) -> float:
    """Seconds of a video, by the difference to a quarter of them: without starts and ends. Tables come in bursts."""

    def seconds(some: Sequence[Clip]) -> float:
        begin = time.perf_counter()
        for _ in run_stages(some, *stages, plan):
            pass
        return time.perf_counter() - begin

    few = clips[: len(clips) // 4]
    return (seconds(clips) - seconds(few)) / (len(clips) - len(few))


def time_decoding(clips: Sequence[Clip], decoder: Stage, cores: int) -> float:
    """Seconds of a video, with a decoder on each core."""
    decoders = [Isolated(decoder.cls, *decoder.arguments) for _ in range(cores)]
    shares = [[clip._asdict() for clip in clips[n::cores]] for n in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda decode: decode(clips[0]._asdict()), decoders))  # they start
        begin = time.perf_counter()
        list(pool.map(lambda decode, share: [decode(clip) and None for clip in share], decoders, shares))
        return (time.perf_counter() - begin) / len(clips)


def time_model(row: dict, model: ClipModel, repetitions: int, batch_size: int) -> float:
    """Seconds of a video that is decoded already."""
    views = pa.Table.from_pylist([row] * batch_size)
    model(views)
    begin = time.perf_counter()
    for _ in range(repetitions):
        model(views)
    return (time.perf_counter() - begin) / repetitions / batch_size


@dataclass
class BulkArguments(PredictionArguments):
    """What is computed."""

    slow_seconds: float = field(default=0.25, metadata={"help": "That the simulated slow model takes for a video."})
    slow_videos: int = field(default=160, metadata={"help": "How many each of them is given."})


def measure(args: BulkArguments, name: str, clips: Sequence[Clip]) -> dict[str, dict]:
    """Rows `bulk`, `decoding`, `model`, `instant` and `slow_xN`.

    `share`: of the rate of the slower stage, of decoding alone, or of N models'.
    """
    model, processor = load_classifier(name)
    result = Result("features", model.classifier.in_features)
    times = defaultdict(list)
    slow = Stage(BlankDecoder, ()), Stage(SlowModel, (Result("features", 1), args.slow_seconds))
    with cluster(None) as resources:
        plan = make_plan(resources)
        decoder, computing = stages_of(model, processor, result, plan)
        decode, compute = decoder.cls(*decoder.arguments), ClipModel(load_classifier(name)[0], processor, result, 1)
        row, cores = decode(clips[0]._asdict()), int(resources["CPU"])
        torch.set_num_threads(plan.threads)  # the decoder has set it to 1
        jobs = {
            "bulk": lambda: time_stages(clips, (decoder, computing), plan),
            "decoding": lambda: time_decoding(clips * REPEATED, decoder, cores),
            "model": lambda: time_model(row, compute, len(clips) // 8, plan.batch_size),
        }
        # As in front of a fast GPU, all cores decode, for batches. Clips are repeated: one decodes in milliseconds.
        instant, fast = Stage(SlowModel, (Result("features", 1), 0.0)), make_plan(resources | {"GPU": 1})
        jobs["instant"] = partial(time_stages, clips * REPEATED, (decoder, instant), fast._replace(gpus=0))
        for n in ACTORS:
            many = [Clip(str(i), str(i)) for i in range(args.slow_videos * n)]  # they outlast the models' start
            jobs[f"slow_x{n}"] = partial(time_stages, many, slow, plan._replace(models=n, batch_size=1))
        list(run_stages(clips[:2], decoder, computing, plan))  # the first run also starts processes of Ray's own
        for name, job in tqdm([*jobs.items()] * args.repetitions, desc="Measuring"):
            times[name].append(job())
    rows = {name: summary(values) for name, values in times.items()}
    rows["bulk"]["share"] = max(rows["decoding"]["seconds"], rows["model"]["seconds"]) / rows["bulk"]["seconds"]
    rows["instant"]["share"] = rows["decoding"]["seconds"] / rows["instant"]["seconds"]
    for n in ACTORS:
        rows[f"slow_x{n}"]["share"] = args.slow_seconds / n / rows[f"slow_x{n}"]["seconds"]
    return rows


def main(arguments: list[str]) -> int:
    """`benchmark.py bulk`. Raises ValueError for settings that do not fit."""
    args = parse_recipe([BulkArguments], arguments, description=__doc__)[0]
    with tempfile.TemporaryDirectory() as scratch:
        name, videos = prepare(args, Path(scratch))
        clips = find_clips([str(videos)])
        rows = measure(args, name, clips)
    grown = ", ".join(f"{rows[f'slow_x{n}']['share']:.0%} of {n} models' rate" for n in ACTORS)
    about = (
        f"Time of a video: the stages of scripts/bulk.py on {len(clips)} videos, decoders alone on all cores, the "
        f"model alone on all cores. Together they reach {rows['bulk']['share']:.0%} of the slower's rate. instant: "
        f"a model that takes no time, {rows['instant']['share']:.0%} of the rate of decoding alone. slow_xN: N models "
        f"that sleep {args.slow_seconds} s for a video reach {grown}."
    )
    return report("Bulk inference", rows, args, about)
