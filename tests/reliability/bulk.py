"""Kill scripts/bulk.py at random moments, start it again with more videos each time, and look for each of them.

    python tests/reliability/bulk.py --kills 20 --output results/reliability/bulk.json

A kill is a SIGKILL of the script: half of them while it starts, half while shards are written. After each the shards
must hold no video twice and all that they held before; a run to the end must then make them complete.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import torch


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import TINY, write_video  # noqa: E402
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig  # noqa: E402
from hf_inti.measure.jobs import write_json  # noqa: E402
from hf_inti.measure.records import provenance  # noqa: E402


VIDEOS_PER_RUN = 12
PATIENCE = 900  # seconds for a run on a busy machine


def prepare(folder: Path) -> None:
    torch.manual_seed(0)
    config = InTIClipVisionConfig(**TINY, num_frames=8, num_labels=3)
    InTIClipForVideoClassification(config).save_pretrained(folder / "model")
    size = {"height": 32, "width": 32}
    processor = InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(folder / "model")
    (folder / "videos").mkdir()


def add_videos(folder: Path, runs: int) -> list[str]:
    """The names of all videos when those of another run are added; the first of each run is broken."""
    for n in range(VIDEOS_PER_RUN):
        path = folder / "videos" / f"{runs:03d}_{n:03d}.mp4"
        path.write_bytes(b"no video") if n == 0 else write_video(path, seed=n)
    return sorted(str(path) for path in (folder / "videos").iterdir())


def rows(folder: Path) -> list[str]:
    return [v for path in (folder / "out").glob("*.parquet") for v in pq.read_table(path)["video"].to_pylist()]


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "scripts" / "bulk.py", folder / "model", folder / "videos"]
    command += ["--output_dir", folder / "out", "--output", "features", "--shard_rows", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    log = open(folder / "log.txt", "a")
    return subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)


def kill(process: subprocess.Popen, folder: Path, while_starting: bool, usual_start: float) -> dict:
    """Kill the script at a random moment, `waited` seconds from its start; `before` and `after` are in videos."""
    begin, before = time.monotonic(), len(rows(folder))
    if while_starting:
        wait = random.uniform(0, usual_start)
        while time.monotonic() - begin < wait and process.poll() is None:
            time.sleep(0.01)
    else:
        wanted = before + random.randrange(1, VIDEOS_PER_RUN)
        while len(rows(folder)) < wanted and process.poll() is None:
            if time.monotonic() - begin > PATIENCE:
                raise TimeoutError((folder / "log.txt").read_text())
            time.sleep(random.uniform(0, 0.05))
    ended, waited = process.poll() is not None, time.monotonic() - begin
    others = [] if ended else psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(others, 120)
    left = [p.pid for p in others if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return {"waited": waited, "before": before, "after": len(rows(folder)), "ended": ended, "left": len(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="How many.")
    parser.add_argument("--output", type=Path, default=Path("results/reliability/bulk.json"), help="The record.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    random.seed(args.seed)
    kills, usual_start = [], 10.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        names, kept = [], []
        while (killed := sum(not each["ended"] for each in kills)) < args.kills:  # some end before they are killed
            names = add_videos(folder, len(kills))
            while_starting = len(kills) % 2 == 1
            kills.append(kill(start(folder), folder, while_starting, usual_start))
            now = rows(folder)
            kills[-1] |= {"twice": len(now) - len(set(now)), "lost": len(set(kept) - set(now))}
            kept, usual_start = now, usual_start if while_starting else kills[-1]["waited"]
            print(f"{killed} of {args.kills} killed before: {kills[-1]}", flush=True)
        status, now = start(folder).wait(PATIENCE), rows(folder)
        end = {"status": status, "videos": len(names), "rows": len(now), "missing": len(set(names) - set(now))}
        end["twice"] = len(now) - len(set(now))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {**provenance(), "kills": kills, "end": end})
    print(end)
    bad = any(k["twice"] or k["lost"] or k["left"] for k in kills) or status or end["missing"] or end["twice"]
    sys.exit("a video was lost or done twice, or processes were left" if bad else 0)


if __name__ == "__main__":
    main()
