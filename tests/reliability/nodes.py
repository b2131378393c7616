"""Kill a node of a Ray cluster of two at random moments of a bulk run, and look for every video.

    python tests/reliability/nodes.py --kills 10 --output results/reliability/nodes.json

The nodes are two on this machine. One of them dies as a machine does that loses its power, with all of its processes;
the run must go on to its end on the other, by itself. Videos are decoded; the model only sleeps, so that a run lasts.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from bulk import PATIENCE, add_videos, prepare, rows  # noqa: E402
from misbehaving import WITH_STAGES  # noqa: E402
from ray_nodes import Nodes, environment, wait_for  # noqa: E402

from conftest import TINY  # noqa: E402
from hf_inti.measure.jobs import write_json  # noqa: E402
from hf_inti.measure.records import provenance  # noqa: E402


RUNS_OF_VIDEOS = 5  # 12 videos in each
SECONDS = 30  # in which the node dies once it has a model: what two models take for all videos, about


def kill(folder: Path, nodes: Nodes) -> dict:
    """One run, and a kill of the last node `waited` seconds after it has a model; `before` and `rows` are in videos."""
    stages = json.dumps([None, ["Zeros", TINY["hidden_size"], 1.0]])
    command = [sys.executable, "-c", WITH_STAGES, stages, ROOT / "scripts" / "bulk.py", folder / "model"]
    command += [folder / "videos", "--output_dir", folder / "out", "--output", "features", "--shard_rows", "1"]
    command += ["--models", "2", "--ray_address", nodes.address]
    with open(folder / "log.txt", "w") as log:
        variables = environment() | nodes.variables
        run = subprocess.Popen([*map(str, command)], env=variables, stdout=log, stderr=log)
        wait_for(lambda: any("Model" in stage for stage in nodes.stages_of_last()), [run])
        waited = random.uniform(0, SECONDS)
        time.sleep(waited)
        stages, before, ended = nodes.stages_of_last(), len(rows(folder)), run.poll() is not None
        begin = time.monotonic()
        nodes.kill_last()
        status = run.wait(PATIENCE)
    found = {"waited": waited, "stages": stages, "before": before, "ended": ended, "status": status}
    return found | {"seconds_after": time.monotonic() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="How many.")
    parser.add_argument("--output", type=Path, default=Path("results/reliability/nodes.json"), help="The record.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    random.seed(args.seed)
    kills = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        names = [add_videos(folder, run) for run in range(RUNS_OF_VIDEOS)][-1]
        nodes = Nodes(folder, count=1)
        try:
            while (killed := sum(not each["ended"] for each in kills)) < args.kills:  # some end before
                nodes.add()
                kills.append(kill(folder, nodes))
                now = rows(folder)
                missing, twice = len(set(names) - set(now)), len(now) - len(set(now))
                kills[-1] |= {"rows": len(now), "missing": missing, "twice": twice}
                print(f"{killed} of {args.kills} killed before: {kills[-1]}", flush=True)
                if kills[-1]["status"]:
                    print((folder / "log.txt").read_text())
                shutil.rmtree(folder / "out")
        finally:
            nodes.stop()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {**provenance(), "videos": len(names), "kills": kills})
    bad = any(each["missing"] or each["twice"] or each["status"] for each in kills)
    sys.exit("a video was lost or done twice, or the run ended" if bad else 0)


if __name__ == "__main__":
    main()
