"""Decoders and models of bulk inference that fail or do nothing. They import nothing that takes time to import."""

import os
import signal
import time

import pyarrow as pa


# Runs a script with these stages in place of those that decode and compute; null leaves one as it is.
WITH_STAGES = """
import json, runpy, sys
from hf_inti.bulk.engine import Stage
import hf_inti.bulk.run
import misbehaving

others = [each and Stage(getattr(misbehaving, each[0]), each[1:]) for each in json.loads(sys.argv[1])]
stages_of = hf_inti.bulk.run.stages_of
hf_inti.bulk.run.stages_of = lambda *arguments: [b or a for a, b in zip(stages_of(*arguments), others, strict=True)]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Misbehaves:
    """Does with a process what it is asked for."""

    def __call__(self, what: str) -> int:
        if what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "hang":
            time.sleep(1000)
        elif what == "fill":
            bytes(2**33)  # 8 GiB, which nothing fills if there is no limit
        return os.getpid()


class Echo:
    """A decoder that decodes nothing."""

    def __call__(self, clip: dict) -> dict:
        return {"video": clip["video"], "error": None, "frames": b"", "shape": []}


class Where:
    """A model that says on which node and in which process it runs."""

    def __call__(self, views):
        import ray

        time.sleep(0.1 * len(views))
        node = ray.get_runtime_context().get_node_id()
        return pa.table({"node": [node] * len(views), "process": [os.getpid()] * len(views)})


class Refuses:
    """A model that takes no batch."""

    def __call__(self, views):
        raise ValueError(f"the crop must be 32, got 16 in {len(views)} videos")


class Zeros:
    """A slow model whose features are all zero."""

    def __init__(self, width: int, seconds: float):
        self.width, self.seconds = width, seconds

    def __call__(self, views):
        time.sleep(self.seconds * len(views))
        features = pa.array([[0.0] * self.width] * len(views), pa.list_(pa.float32(), self.width))
        return pa.table({"video": views["video"], "error": pa.nulls(len(views), pa.string()), "features": features})
