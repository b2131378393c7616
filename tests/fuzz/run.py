"""Decode broken videos: each must give frames or a VideoDecodingError, in bounded time and memory.

    python tests/fuzz/run.py --cases 20000 --output results/reliability/fuzz.json

Seeded: a case is made from its number alone. Broken are small files of several containers, and those of --videos. A
third is read from files, and a third each as the endpoint and the demo page do, which check sizes first. Cases are
decoded in forks, so that a crash is counted and the next case goes on; --keep saves what crashed, hung or failed
otherwise. --output is written after every portion, and the same command continues from there.
"""

import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[n]) for n in (1, 2)] + [str(Path(__file__).parents[2] / "scripts")]

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from demo_clips import open_clip  # noqa: E402
from fuzz.mutations import mutate  # noqa: E402

from hf_inti.hub.handler import MAX_PIXELS, MAX_SECONDS, check_size  # noqa: E402
from hf_inti.measure import memory  # noqa: E402
from hf_inti.measure.jobs import write_json  # noqa: E402
from hf_inti.measure.records import provenance  # noqa: E402
from hf_inti.model.video_decoding import VideoDecodingError, VideoReader  # noqa: E402


SECONDS, WAITING, MEMORY, PORTION = 20, 600, 2 * 2**30, 250  # of the processor's time, of the clock's, bytes, cases
ADVICE = re.compile("; (send|scale|cut) [^;]*\\.$")
PAGE = {"max_seconds": 120.0, "max_pixels": 4096 * 2304}  # demo_app.py's defaults
WAYS = ("file", "endpoint", "page")
CPU = torch.device("cpu")
KINDS = ("decoded", "refused", "too_large", "hung", "crashed", "failed")
CONTAINERS = {"mp4": "libx264", "mkv": "mpeg4", "webm": "libvpx", "avi": "mpeg4", "ts": "mpeg2video", "mov": "mpeg4"}
EXTENSIONS = (*CONTAINERS, "txt", "m3u8", "jpg")


def write_seed(path: Path, codec: str, width: int = 64) -> bytes:
    draw = np.random.default_rng(0)
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:  # no random identifiers, no dates
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        for _ in range(12):
            picture = draw.integers(0, 255, (48, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def endpoint_refuses(data: bytes) -> bool:
    """Whether the endpoint refuses a video before it decodes it, and says what to do."""
    try:
        check_size(data, MAX_SECONDS, MAX_PIXELS)
    except ValueError as error:
        if not ADVICE.search(str(error)):
            raise
        return True
    return False


def decode(data: bytes, way: str, path: Path) -> str:
    """Read a few frames, from the file `path` or as someone does who gets it under this name; what became of it."""
    source = data
    try:
        if way == "file":
            source = path
            source.write_bytes(data)
        elif way == "page":
            source = open_clip(data, path.name, **PAGE)
        elif endpoint_refuses(data):
            return "refused"
        with VideoReader(source) as reader:
            last = reader.num_frames - 1
            reader.read([0, last // 2, last])
        return "decoded"
    except VideoDecodingError:
        return "refused"
    except MemoryError:
        return "too_large"


def work(files: list[bytes], first: int, last: int, seed: int, folder: Path, report) -> None:
    """Decode the cases from `first`, in a process of its own; a line before and after each. Seconds are its CPU's."""
    with open("/proc/self/statm") as file:
        pages = [int(number) for number in file.read().split()[:2]]
    mapped, size = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, -1))
    for case in range(first, last):
        draw = random.Random(f"{seed} {case}")
        data, how = mutate(files, draw)
        report.write(json.dumps({"case": case, "how": how}) + "\n")
        begin = time.process_time()
        memory.reset_peak(CPU)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the default action of both signals kills
        signal.alarm(WAITING)
        try:
            outcome = decode(data, draw.choice(WAYS), folder / f"case.{draw.choice(EXTENSIONS)}")
        except Exception as error:
            outcome = f"failed with {type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        more = memory.peak(CPU) - size
        report.write(json.dumps({"outcome": outcome, "seconds": time.process_time() - begin, "bytes": more}) + "\n")


def outcomes(files: list[bytes], first: int, last: int, seed: int, folder: Path) -> list[dict]:
    """Of each case, from as many processes as it takes. What hangs is tried once more: the machine may have slept."""
    found, again = [], None
    while first + len(found) < last:
        path = folder / "report"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's complaints
            with path.open("w", buffering=1) as report:
                work(files, first + len(found), last, seed, folder, report)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        before, after = lines[::2], lines[1::2]
        if len(after) < len(before):
            hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
            if hung and before[-1]["case"] != again:
                again = before.pop()["case"]
            else:
                after.append({"outcome": "hung" if hung else f"crashed ({status})", "seconds": SECONDS, "bytes": 0})
        found += [{**b, **a} for b, a in zip(before, after, strict=True)]
    return found


def kind(case: dict) -> str:
    return case["outcome"].split()[0]


def summary(before: dict, found: list[dict]) -> dict:
    """Of the cases that `before` sums up, and of those just found."""
    kinds = Counter({name: before.get(name, 0) for name in KINDS}) + Counter(map(kind, found))
    mutations = Counter(before.get("by_mutation", {}))
    mutations.update(name for case in found for name in case["how"].split("+"))
    worst = {}
    for name, unit in (("longest", "seconds"), ("largest", "bytes")):
        worst[name] = max([*([before[name]] if before else []), *found], key=lambda case: case[unit])
    return {
        "cases": before.get("cases", 0) + len(found),
        **{name: kinds[name] for name in KINDS},
        **worst,
        "by_mutation": dict(mutations.most_common()),
        "bad": before.get("bad", []) + [case for case in found if kind(case) in ("hung", "crashed", "failed")][:100],
    }


def seeds(folder: Path, videos: Path | None) -> list[bytes]:
    files = [write_seed(folder / f"seed.{extension}", codec) for extension, codec in CONTAINERS.items()]
    files.append(files[-2] + write_seed(folder / "wide.ts", CONTAINERS["ts"], width=96))  # the size changes in it
    if videos:
        more = [path.read_bytes() for path in sorted(videos.iterdir()) if path.suffix != ".md"]
        files += [data for data in more if 0 < len(data) <= 10**6]
    return files


def begun(output: Path | None, run: dict) -> dict:
    """What an earlier run with the same files and seed has written to `output`."""
    if output is None or not output.exists():
        return {}
    before = json.loads(output.read_text())
    if any(before[name] != value for name, value in run.items()):
        raise SystemExit(f"error: {output} must be of the same files and seed, got another run's; move it away.")
    return {name: before[name] for name in ("cases", *KINDS, "longest", "largest", "by_mutation", "bad")}


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=Path, help="a folder of more files to break, each of at most 1 MB")
    parser.add_argument("--keep", type=Path, help="a folder for the files that crash, hang or fail otherwise")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts, with command, commit and machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = seeds(Path(name), options.videos)
        run = {"files": len(files), "seed": options.seed, "sha256": hashlib.sha256(b"".join(files)).hexdigest()}
        result = begun(options.output, run)
        where = provenance()
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
        for first in range(result.get("cases", 0), options.cases, PORTION):
            last = min(first + PORTION, options.cases)
            result = summary(result, outcomes(files, first, last, options.seed, Path(name)))
            if options.output:
                write_json(options.output, {**result, **run, **where})
    for bad in result["bad"] if options.keep else []:
        options.keep.mkdir(parents=True, exist_ok=True)
        data, _ = mutate(files, random.Random(f"{options.seed} {bad['case']}"))
        (options.keep / f"{bad['case']}.bin").write_bytes(data)
    print(json.dumps(result, indent=2))
    return int(bool(result["bad"]))


if __name__ == "__main__":
    sys.exit(main())
