"""Break what a training run depends on, and see one clear message and no lost checkpoint.

    python tests/reliability/faults.py --output results/reliability/faults.json

Each strikes a run of six steps, with a checkpoint after each. Unless the run goes on, its newest checkpoint must still
be there, and resumed without the fault it must end bit for bit as a run without any. The full disk needs the right to
mount one, and is skipped otherwise.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from tiny import RANDOM, check, check_end, main, make_inputs, run
from torch.utils.data import get_worker_info

from hf_inti import InTIClipVideoProcessor
from hf_inti.data.clips import VideoClips
from hf_inti.training.state import TrainingState, newest_checkpoint


STEP = 4
NOBODY = 65534


def in_step(act: Callable, steps: tuple[int, ...] = (STEP,)) -> None:
    """Call `act` at the end of these steps."""
    finish = TrainingState.finish_step

    def replacement(self):
        finish(self)
        if self.step in steps:
            act()

    TrainingState.finish_step = replacement


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 4 MiB at `folder`. Raises CalledProcessError where mounting one is not allowed."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount(work: Path) -> bool:
    (work / "probe").mkdir()
    try:
        with small_disk(work / "probe"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def full_disk() -> None:
    """Fill the file system that the run writes to."""

    def fill() -> None:
        with open("struck/filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    in_step(fill)


def limit_files() -> None:
    """No file may grow beyond 50 kB, as a quota does it: the system's answer is EFBIG instead of ENOSPC."""
    in_step(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))


def read_only() -> None:
    if os.geteuid() == 0:  # whom no mode stops
        os.seteuid(NOBODY)


def nan(always: bool) -> None:
    normalize, seen = InTIClipVideoProcessor.rescale_and_normalize, []

    def replacement(self, frames):
        seen.append(1)
        values = normalize(self, frames)
        return values * torch.nan if torch.is_grad_enabled() and (always or len(seen) == 2) else values

    InTIClipVideoProcessor.rescale_and_normalize = replacement


def dead_worker() -> None:
    get = VideoClips.__getitem__

    def replacement(self, index):
        if self._epoch == 1 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    VideoClips.__getitem__ = replacement


def tell_all(number: int) -> None:
    """Send a signal to the run and its workers, as a scheduler does: from another process."""
    if (sender := os.fork()) == 0:
        os.killpg(0, number)
        os._exit(0)
    os.waitpid(sender, 0)


class Fault(NamedTuple):
    name: str
    before: Callable  # in the process of the run
    status: int
    message: str  # a pattern of what it prints
    flags: str = ""
    resumes: bool = True


def faults(work: Path) -> list[Fault]:
    told = {number: lambda number=number: tell_all(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopped = r"Stopped by {} after step 5; the same command with --resume true continues\."
    part = r"error: \S+step_4\.part must be writable, got: "
    video = work / "videos" / "c" / "3.mp4"
    return [
        Fault("full disk", full_disk, 1, part + r".*No space left.*; .*from \S+step_3\."),
        Fault("limit on files", limit_files, 1, part + r".*File too large.*; .*from \S+step_3\."),
        Fault("read-only folder", read_only, 1, r"error: \S+ must be writable, got: Permission denied; .*"),
        Fault("video vanishes", lambda: in_step(video.unlink, (1,)), 0, r"1 broken videos\n.*3\.mp4: .*", "", False),
        Fault("worker dies", dead_worker, 1, "error: DataLoader workers must live, got process .*", "--num_workers 1"),
        Fault("NaN loss once", lambda: nan(always=False), 0, r"1 steps were skipped, because .*", "", False),
        Fault("NaN loss always", lambda: nan(always=True), 1, r"error: the loss must be finite, got nan .*mp4.*",
              "--max_skipped_steps 2", False),
        Fault("SIGTERM", lambda: in_step(told[signal.SIGTERM]), 143, stopped.format("SIGTERM"), "--num_workers 1"),
        Fault("Ctrl-C", lambda: in_step(told[signal.SIGINT]), 130, stopped.format("SIGINT"), "--num_workers 1"),
    ]  # fmt: skip


def said(log: Path, pattern: str, work: Path) -> str:
    """What matches `pattern` in the log, which must hold no traceback."""
    text = log.read_text().replace("\r", "\n")
    found = re.search(pattern, text)
    check(found and "Traceback" not in text, f"{pattern} must be found, without a traceback, got: {text}")
    return found[0].replace(str(work), "...")


def strike(fault: Fault, flags: list, work: Path) -> dict:
    """One run with the fault, and one that resumes it; returns what happened."""
    folder, log = work / "struck", work / "log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if fault.name == "read-only folder":
        folder.chmod(0o555)
    flags = [*flags, "--output_dir", folder, *fault.flags.split()]
    with small_disk(folder) if fault.name == "full disk" else nullcontext():
        status = run(flags, log, fault.before)
        folder.chmod(0o755)
        (folder / "filler").unlink(missing_ok=True)
        wanted = f"{fault.name}: the status must be {fault.status}, got {status}: {log.read_text()}"
        check(status == fault.status, wanted)
        says = said(log, fault.message, work)
        left = newest_checkpoint(folder)
        if fault.resumes:
            check(run([*flags, "--resume"], log) == 0, log.read_text())
            check_end(work / "whole", folder)
    return {"fault": fault.name, "status": status, "says": says, "left": left and left.name}


def vanished_file(flags: list, work: Path) -> dict:
    """A checkpoint that lost a file is named; it is not taken for a new run, and nothing is deleted."""
    folder, log = work / "struck", work / "log"
    flags = [*flags, "--output_dir", folder, "--resume"]
    (lost,) = folder.glob("checkpoints/*/optimizer.bin")
    lost.rename(work / "optimizer.bin")
    check(run(flags, log) == 1, log.read_text())
    says = said(log, r"error: .*step_6 must be a whole checkpoint, got .*optimizer\.bin.*", work)
    (work / "optimizer.bin").rename(lost)
    check(run(flags, log) == 0, log.read_text())
    check_end(work / "whole", folder)
    return {"fault": "file of a checkpoint vanishes", "status": 1, "says": says, "left": lost.parent.name}


def measure(work: Path) -> dict:
    work.chmod(0o755)
    flags = [*make_inputs(work), *RANDOM, "--eval_dir", work / "videos", "--epochs", 2, "--checkpoint_every_steps", 1]
    check(run([*flags, "--output_dir", work / "whole"], work / "log") == 0, "it must train")
    kept = shutil.copytree(work / "videos", work / "kept")
    found = []
    for fault in faults(work):
        if fault.name == "full disk" and not can_mount(work):
            continue
        found.append(strike(fault, flags, work))
        shutil.copytree(kept, work / "videos", dirs_exist_ok=True)
    found.append(vanished_file(flags, work))
    return {"faults": found, "different": 0, "lost": 0}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)
