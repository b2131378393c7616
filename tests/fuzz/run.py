"""Decode broken videos: each must give frames or a VideoDecodingError, in bounded time and memory.

    python tests/fuzz/run.py --cases 20000 --output results/reliability/fuzz.json

Seeded: a case is made from its number alone. Broken are small files of several containers, and those of --videos. Cases
are decoded in forks, so that a crash is counted and the next case goes on; --keep saves what crashed, hung or failed
otherwise.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import av  # noqa: E402
import numpy as np  # noqa: E402
from fuzz.mutations import mutate  # noqa: E402

from hf_inti.measure.jobs import write_json  # noqa: E402
from hf_inti.measure.records import provenance  # noqa: E402
from hf_inti.model.video_decoding import VideoDecodingError, VideoReader  # noqa: E402


SECONDS, MEMORY = 20, 2 * 2**30
CONTAINERS = {"mp4": "libx264", "mkv": "mpeg4", "webm": "libvpx", "avi": "mpeg4", "ts": "mpeg2video", "mov": "mpeg4"}
EXTENSIONS = (*CONTAINERS, "txt", "m3u8", "jpg")


def write_seed(path: Path, codec: str) -> bytes:
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            picture = draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def decode(data: bytes, folder: Path, draw: random.Random) -> str:
    """Read a few frames, as a file with some extension or from memory; returns what became of it."""
    source = data
    if draw.random() < 0.5:
        source = folder / f"case.{draw.choice(EXTENSIONS)}"
        source.write_bytes(data)
    try:
        with VideoReader(source) as reader:
            last = reader.num_frames - 1
            reader.read([0, last // 2, last])
        return "decoded"
    except VideoDecodingError:
        return "refused"
    except MemoryError:
        return "too_large"


def work(files: list[bytes], first: int, last: int, seed: int, folder: Path, report) -> None:
    """Decode the cases from `first`, in a process of its own; a line before and after each."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, -1))
    for case in range(first, last):
        draw = random.Random(f"{seed} {case}")
        data, how = mutate(files, draw)
        report.write(json.dumps({"case": case, "how": how}) + "\n")
        begin, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(SECONDS)  # the default action kills
        try:
            outcome = decode(data, folder, draw)
        except Exception as error:
            outcome = f"failed with {type(error).__name__}: {error}"
        signal.alarm(0)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
        report.write(json.dumps({"outcome": outcome, "seconds": time.monotonic() - begin, "kib": more}) + "\n")


def outcomes(files: list[bytes], cases: int, seed: int, folder: Path) -> list[dict]:
    """Of each case, from as many processes as it takes."""
    found = []
    while len(found) < cases:
        path = folder / "report"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's complaints
            with path.open("w", buffering=1) as report:
                work(files, len(found), cases, seed, folder, report)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        before, after = lines[::2], lines[1::2]
        if len(after) < len(before):
            hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
            after.append({"outcome": "hung" if hung else f"crashed ({status})", "seconds": SECONDS, "kib": 0})
        found += [{**b, **a} for b, a in zip(before, after, strict=True)]
    return found


def summary(found: list[dict]) -> dict:
    kinds = Counter(each["outcome"].split()[0] for each in found)
    longest, largest = (max(found, key=lambda each: each[name]) for name in ("seconds", "kib"))
    return {
        "cases": len(found),
        **{kind: kinds[kind] for kind in ("decoded", "refused", "too_large", "hung", "crashed", "failed")},
        "longest_seconds": round(longest["seconds"], 3),
        "longest": f"case {longest['case']}, {longest['how']}",
        "largest_mib": round(largest["kib"] / 1024, 1),
        "largest": f"case {largest['case']}, {largest['how']}",
        "by_mutation": dict(Counter(name for each in found for name in each["how"].split("+")).most_common()),
        "bad": [each for each in found if each["outcome"].split()[0] in ("hung", "crashed", "failed")][:100],
    }


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=Path, help="a folder of more files to break, each of at most 1 MB")
    parser.add_argument("--keep", type=Path, help="a folder for the files that crash, hang or fail otherwise")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts, with command, commit and machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [write_seed(folder / f"seed.{extension}", codec) for extension, codec in CONTAINERS.items()]
        if options.videos:
            more = [path.read_bytes() for path in sorted(options.videos.iterdir()) if path.suffix != ".md"]
            files += [data for data in more if 0 < len(data) <= 10**6]
        result = summary(outcomes(files, options.cases, options.seed, folder))
    for bad in result["bad"] if options.keep else []:
        options.keep.mkdir(parents=True, exist_ok=True)
        data, _ = mutate(files, random.Random(f"{options.seed} {bad['case']}"))
        (options.keep / f"{bad['case']}.bin").write_bytes(data)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, {**result, **provenance()})
    return int(bool(result["bad"]))


if __name__ == "__main__":
    sys.exit(main())
