"""The processes of a bulk run, started and fed by Ray Data: decoders, then models, on one machine or a cluster."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..data.unlabelled import Clip
from .isolation import Died, Isolated


CLIPS_PER_TASK = 16
MAX_TASKS = 20_000  # at once; longer lists have more clips in each
BLOCK_BYTES = 64 * 2**20  # decoded clips that travel together


class Stage(NamedTuple):
    """A class whose instances are called in processes of their own, and its arguments."""

    cls: type
    arguments: tuple[Any, ...]


class Plan(NamedTuple):
    """How many processes; `threads` are those of each model on a CPU."""

    models: int
    decoders: int
    threads: int
    gpus: float  # of each model
    batch_size: int


def import_ray():
    """Ray with its data library. Raises ImportError that says how to install it."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"bulk inference needs Ray ({error}); run `pip install 'hf_inti[bulk]'`.") from error
    return ray


@contextmanager
def cluster(address: str | None) -> Iterator[dict[str, float]]:
    """Connect to a cluster, or start a private one on this machine; its resources. It is left or stopped at the end."""
    ray = import_ray()
    # It reports as an error that arguments of actors are kept where all machines find them.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options |= {"num_cpus": cores, "include_dashboard": False}
        # Ray makes its workers nice: on few cores a model then waits for Ray's own processes.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError) as error:
        if address is None:
            raise
        raise ValueError(
            f"ray_address must be that of a running cluster, got {address}: {' '.join(str(error).split())}; start one "
            "with `ray start --head`."
        ) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what stops a run is raised, too
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    try:
        yield ray.cluster_resources() | {"machines": sum(node["Alive"] for node in ray.nodes())}
    finally:
        ray.shutdown()


def make_plan(
    resources: dict[str, float], models: int | None = None, decoders: int | None = None, batch_size: int | None = None
) -> Plan:
    """Fill in what is None: a model on each GPU, else on each machine; as many decoders as cores are left."""
    cpus, gpus = int(resources["CPU"]), int(resources.get("GPU", 0))
    models = models or gpus or int(resources["machines"])
    decoders = decoders or max(1, cpus - (0 if gpus else models))
    share = min(1.0, gpus / models)
    return Plan(models, decoders, max(1, cpus // models), share, batch_size or (8 if gpus else 1))


class _Model:
    """An instance of a stage, from arguments that are sent to every machine once."""

    def __init__(self, cls: type, arguments: Any):
        self.stage = cls(*import_ray().get(arguments))

    def __call__(self, views: pa.Table) -> pa.Table:
        return self.stage(views)


class _Decoder:
    """A process that has one of its own for the decoder; a clip that kills that is broken."""

    def __init__(self, isolated: Isolated):
        self.isolated, self.lock = isolated, Lock()

    def __call__(self, clips: pa.Table) -> Iterator[pa.Table]:
        for clip in clips.to_pylist():
            try:
                with self.lock:
                    row = self.isolated(clip)
            except Died as error:
                reason = f"the process that decoded it {error} (replace the file or leave it out)"
                row = {"video": clip["video"], "error": reason, "frames": b"", "shape": []}
            yield _make_row(**row)


def _make_row(video: str, error: str | None, frames: bytes, shape: list[int]) -> pa.Table:
    """A table that holds the frames without a copy, which rows of Python objects would cost twice."""
    ends = pa.py_buffer(np.array([0, len(frames)]))
    columns = {
        "video": pa.array([video], pa.string()),
        "error": pa.array([error], pa.string()),
        "frames": pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(frames)]),
        "shape": pa.array([shape], pa.list_(pa.int64())),
    }
    return pa.table(columns)


def run_stages(clips: Sequence[Clip], decoder: Stage, model: Stage, plan: Plan) -> Iterator[pa.Table]:
    """The models' tables, a row for each clip, in any order. The decoder makes `ClipDecoder`'s rows of clips as dicts.

    Decoders grow in number while the models wait for them, and wait while frames pile up. What was in a process or on a
    machine that died is computed again. Raises ValueError for an error in a stage.
    """
    ray = import_ray()
    per_task = max(1, min(CLIPS_PER_TASK, len(clips) // plan.decoders), len(clips) // MAX_TASKS)
    rows = ray.data.from_items([clip._asdict() for clip in clips], override_num_blocks=-(-len(clips) // per_task))
    views = rows.map_batches(
        _Decoder,
        fn_constructor_args=(Isolated(decoder.cls, *decoder.arguments),),
        batch_size=None,
        batch_format="pyarrow",
        # Two calls: one's frames are packed while the other's are decoded.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=plan.decoders, max_concurrent_calls_per_actor=2),
        num_cpus=1,
    )
    tables = views.map_batches(
        _Model,
        fn_constructor_args=(model.cls, ray.put(model.arguments)),
        batch_size=plan.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=plan.models),
        num_cpus=0,
        num_gpus=plan.gpus,
        memory=1,  # Ray spreads over the machines what asks for something, and puts anywhere what does not
    )
    try:
        yield from tables.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        # Ray wraps the error in tracebacks and advice; its own errors are only the wrapping.
        lines = re.findall(r"^(?!ray\.)((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", str(error), re.MULTILINE)
        reason = lines[-1] if lines else str(error).strip().splitlines()[0]
        advice = "if memory is short, a smaller batch_size may do."
        raise ValueError(f"every stage must work, got {reason}; {advice}") from error
