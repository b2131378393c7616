"""Scripts and modules run in processes of their own, which no interruption leaves behind.

This file is also what those processes start with, and so imports nothing that takes time.
"""

import json
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
LOG_LINES = 20  # of a failed job, that are shown


class Job(NamedTuple):
    """What to run: a script's path or a module's name, and its arguments; when it is done the file `output` exists."""

    name: str
    arguments: list[str]
    log: Path
    output: Path


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, values: dict) -> None:
    """At once: an interruption leaves the whole file or none."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(part, path)


def start(job: Job, threads: int) -> subprocess.Popen:
    """Run a job in a process that ends when this one does, however it does."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # in scripts/, evaluate.py would be taken for the package of that name
        "TQDM_MININTERVAL": "30",  # logs are for reading
    }
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *job.arguments]
    with job.log.open("a") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)


def end_with_parent() -> None:
    """End this process when its standard input closes: the parent holds the other end, and never writes."""

    def wait():
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def fail(job: Job):
    """Show the end of a job's log, and raise a ValueError with its last line."""
    text = job.log.read_text(errors="replace").replace("\r", "\n")  # of progress bars
    lines = [line for line in text.splitlines() if line.strip()]
    print(f"The end of {job.log}:", *lines[-LOG_LINES:], sep="\n  ", file=sys.stderr)
    last = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
    raise ValueError(f"{job.name} failed: {last} (all of it in {job.log})")


def run_jobs(
    jobs: list[Job], at_a_time: int, threads: int, description: str, done: Callable[[Job, float], str]
) -> None:
    """Do the jobs whose output does not exist yet, `at_a_time` at once, each with its share of `threads`.

    `done(job, seconds)` is called after each, with the time that it took, and returns what to show. Raises ValueError
    when one fails; the others end then.
    """
    from accelerate.utils import tqdm

    waiting = [job for job in jobs if not job.output.exists()]
    running: list[tuple[Job, subprocess.Popen, float]] = []
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=description, unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                running.append((job, start(job, max(1, threads // at_a_time)), time.monotonic()))
            time.sleep(0.1)
            for job, process, begun in [each for each in running if each[1].poll() is not None]:
                running.remove((job, process, begun))
                process.stdin.close()
                if process.returncode != 0:
                    fail(job)
                message = done(job, time.monotonic() - begun)
                bar.write(message, file=sys.stderr)  # as the bar; standard output is for results
                bar.update()
    finally:
        for _, process, _ in running:
            process.kill()
            process.wait()
            process.stdin.close()
        bar.close()


if __name__ == "__main__":  # one of those processes
    end_with_parent()
    sys.argv = sys.argv[1:]
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
