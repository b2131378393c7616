"""How much memory it takes to read 16 frames of a video of 10 seconds, and of one of an hour.

    python tests/reliability/lengths.py --output results/reliability/lengths.json

The videos are generated, H.264 of 160 x 120 at 25 frames a second; each is read in a fork, whose peak is given beyond
what it holds before. The list of packets grows with the length, the frames held do not.
"""

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from tiny import check, main

from hf_inti.measure.memory import held, peak, reset_peak
from hf_inti.model.video_decoding import VideoReader


CPU = torch.device("cpu")
SECONDS, RATE, FRAMES = (10, 60, 600, 3600), 25, 16
MOST = 64 * 2**20  # bytes for an hour more than for 10 seconds: 90,000 packets at a few hundred bytes


def write_long_video(path: Path, seconds: int) -> None:
    """Noise that drifts; the same second again and again would be cheaper, but no video."""
    picture = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        frames = [
            av.VideoFrame.from_ndarray(np.roll(picture, 4 * t, axis=1), format="rgb24").reformat(format="yuv420p")
            for t in range(40)
        ]
        for t in range(seconds * RATE):
            frame = frames[t % len(frames)]
            frame.pts, frame.time_base = t, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read(path: Path, report: Path) -> None:
    """In a fork: its memory is not another video's."""
    child = os.fork()
    if child == 0:
        reset_peak(CPU)
        before, begin = held(CPU), time.monotonic()
        with VideoReader(path) as reader:
            count = reader.num_frames
            reader.read([round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)])
        values = {"frames": count, "bytes": peak(CPU) - before, "seconds": time.monotonic() - begin}
        report.write_text(json.dumps(values))
        os._exit(0)
    check(os.waitpid(child, 0)[1] == 0, "it must be read")


def measure(work: Path) -> dict:
    torch.set_num_threads(1)
    rows = []
    for seconds in SECONDS:
        write_long_video(work / "clip.mp4", seconds)
        read(work / "clip.mp4", work / "report")
        row = json.loads((work / "report").read_text())
        check(row["frames"] == seconds * RATE, f"{seconds * RATE} frames are needed, got {row['frames']}")
        row |= {"video_seconds": seconds, "file_bytes": (work / "clip.mp4").stat().st_size}
        rows.append({**row, "mib": round(row["bytes"] / 2**20, 1), "seconds": round(row["seconds"], 2)})
    more = rows[-1]["mib"] - rows[0]["mib"]
    check(more <= MOST / 2**20, f"an hour may take {MOST / 2**20} MiB more than 10 seconds, got {rows}")
    return {"read": rows}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
