"""Kill a training run again and again, resume it, and compare its end with a run that was never stopped.

    python tests/reliability/kills.py --kills 50 --output results/reliability/kills.json

Every second kill comes at a random time, every other before a random one of the run's calls that open, rename or
delete a file in its output folder, most of which write checkpoints. After each kill best/, last/ and the newest
checkpoint must be those before it or later ones, and best/ and last/ whole.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny import RANDOM, check, check_end, fingerprint, main, make_inputs, run, start, wait

from hf_inti.training import state as training
from hf_inti.training.state import newest_checkpoint


def at_file_call(folder: Path, act: Callable) -> None:
    """Call `act` before this process's calls that open, rename or delete something in `folder`."""

    def hook(event, arguments):
        if event.startswith(("open", "os.", "shutil.")) and any(
            isinstance(a, (str, Path)) and str(a).startswith(str(folder)) for a in arguments
        ):
            act()

    sys.addaudithook(hook)


def die_at(folder: Path, count: int) -> None:
    calls = iter(range(1, count))
    at_file_call(folder, lambda: next(calls, None) or os.kill(os.getpid(), signal.SIGKILL))


def count_calls(folder: Path, file: Path) -> None:
    """Write to `file` a line for each call that `at_file_call` finds, and for each new best/ or last/ its weights."""
    stream = file.open("w", buffering=1)
    at_file_call(folder, lambda: stream.write("call\n"))
    replace = training.replace_folder

    def replacement(finished, target):
        replace(finished, target)
        if target.name in ("best", "last"):
            stream.write(f"{fingerprint(target)}\n")

    training.replace_folder = replacement


def found_in(folder: Path) -> tuple[str | None, str | None, int]:
    """best/, last/ and the step of the newest checkpoint, -1 if there is none."""
    checkpoint = newest_checkpoint(folder)
    step = int(checkpoint.name.removeprefix("step_")) if checkpoint else -1
    return fingerprint(folder / "best"), fingerprint(folder / "last"), step


def check_kill(before: tuple, now: tuple, versions: set[str]) -> None:
    for name, was, found in zip(("best", "last"), before, now, strict=False):
        check(found in versions or found is was is None, f"{name}/ must be one that the run wrote, got {found}")
    check(now[2] >= before[2], f"the newest checkpoint must be step {before[2]} or later, got {now[2]}")


def measure(work: Path, kills: int, seed: int) -> dict:
    """Kill `kills` times, starting a new run whenever one ends; returns the counts."""
    flags = [*make_inputs(work), *RANDOM, "--eval_dir", work / "videos", "--epochs", 2, "--checkpoint_every_steps", 1]
    whole, killed, log = work / "whole", work / "killed", work / "log"
    begin = time.monotonic()
    check(run([*flags, "--output_dir", whole], log, lambda: count_calls(whole, work / "calls")) == 0, "it must train")
    seconds, lines = time.monotonic() - begin, (work / "calls").read_text().split()
    calls, versions = lines.count("call"), set(lines) - {"call"}

    draw = random.Random(seed)
    nothing = (None, None, -1)
    counts = {"kills": 0, "at_file_calls": 0, "with_half_a_checkpoint": 0, "with_best": 0, "runs": 0}
    before = nothing
    while counts["kills"] < kills:
        timed = counts["kills"] % 2 == 0
        count = draw.randint(1, calls // 2)
        hook = (lambda: None) if timed else lambda count=count: die_at(killed, count)
        child = start([*flags, "--output_dir", killed, "--resume"], log, hook)
        status = wait(child, draw.uniform(0, seconds) if timed else None)
        check(status in (0, -signal.SIGKILL), f"train.py must end or be killed, got {status}: {log.read_text()}")
        if status == 0:
            check_end(whole, killed)
            shutil.rmtree(killed)
            counts["runs"], before = counts["runs"] + 1, nothing
            continue
        counts["kills"] += 1
        counts["at_file_calls"] += not timed
        counts["with_half_a_checkpoint"] += any(killed.glob("checkpoints/*.part"))
        now = found_in(killed)
        counts["with_best"] += now[0] is not None
        check_kill(before, now, versions)
        before = now
    check(run([*flags, "--output_dir", killed, "--resume"], log) == 0, log.read_text())
    check_end(whole, killed)
    return {**counts, "runs": counts["runs"] + 1, "different": 0, "lost": 0}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, kills=50, seed=0)
