"""Decoders and models of bulk inference that fail or do nothing. They import nothing that takes time to import."""

import os
import signal
import time

import pyarrow as pa


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
        return {"video": clip["video"]}


class Refuses:
    """A model that takes no batch."""

    def __call__(self, views):
        raise ValueError(f"the crop must be 32, got 16 in {len(views)} videos")


class Zeros:
    """A slow model whose features are all zero."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, views):
        time.sleep(1.5 * len(views))
        features = pa.array([[0.0] * self.width] * len(views), pa.list_(pa.float32(), self.width))
        return pa.table({"video": views["video"], "error": pa.nulls(len(views), pa.string()), "features": features})
