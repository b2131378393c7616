"""Train and evaluate with several processes, and compare with one.

    python tests/reliability/processes.py --output results/reliability/processes.json

The same global batch in 1, 2 and 4 processes must give the same losses; a run of 4 processes that is resumed by 2 and
then by 1 too; evaluation the same scores. A process that dies must take the job down with a message, and a job that a
scheduler ends must save.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tiny import check, main, make_inputs, run, run_processes

from hf_inti.training.state import TrainingState, newest_checkpoint


GLOBAL_BATCH = 4
EPOCH = 3  # steps
RARELY = ["--checkpoint_every_steps", 1000]  # so that what is left is what a stop saved
STRUCK = Path(__file__).with_name("struck.py")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def difference(a: list[float], b: list[float]) -> float:
    check(len(a) == len(b), f"as many numbers are needed, got {len(a)} and {len(b)}")
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def train(processes: int, flags: list, output: Path, log: Path, before=lambda: None, **variables: str) -> None:
    flags = [*flags, "--batch_size", GLOBAL_BATCH // processes, "--output_dir", output]
    if processes == 1:
        statuses, logs = [run(flags, log)], [log]
    else:
        statuses = run_processes(processes, flags, log, before, **variables)
        logs = [log.with_name(f"{log.name}{rank}") for rank in range(processes)]
    check(not any(statuses), f"{output.name} must train, got {statuses}: {[each.read_text() for each in logs]}")


def stop_after(steps: int) -> None:
    """End the run as a signal would, after the step that follows."""
    finish = TrainingState.finish_step

    def replacement(self):
        finish(self)
        if self.step == steps:
            self.interruption.signal = 15

    TrainingState.finish_step = replacement


def within_an_epoch(step: int) -> int:
    """Where to call `stop_after`: at this step or the next."""
    return step + ((step + 1) % EPOCH == 0)


def saved_step(output: Path) -> int:
    """Of the checkpoint that a stop left in the middle of an epoch."""
    progress = json.loads((newest_checkpoint(output) / "progress.json").read_text())
    check(progress["batches"] > 0, f"it must stop in the middle of an epoch, got {progress}")
    return progress["step"]


def check_resumed(output: Path, step: int) -> None:
    resumed = json.loads((output / "run.json").read_text())["resumed_at_step"]
    check(resumed == step, f"it must go on from step {step}, got {resumed}")


def resumed_by_others(flags: list, work: Path, steps: int) -> list[float]:
    """The losses of a run of 4 processes that 2 go on with in the middle of an epoch, and then 1."""
    output, saved = work / "resumed", 0
    for processes, stop in ((4, 2 * steps // 5), (2, 7 * steps // 10), (1, None)):
        batch = ["--batch_size", GLOBAL_BATCH // processes, "--output_dir", output, "--resume", *RARELY]
        before = (lambda stop=stop: stop_after(within_an_epoch(stop))) if stop else lambda: None
        log = work / "log"
        if processes == 1:
            statuses = [run([*flags, *batch], log)]
        else:
            statuses = run_processes(processes, [*flags, *batch], log, before)
        wanted = 143 if stop else 0
        check(set(statuses) == {wanted}, f"{processes} processes must end with {wanted}, got {statuses}")
        if saved:
            check_resumed(output, saved)
        saved = saved_step(output) if stop else None
    return losses(output)


def evaluations(model: Path, videos: Path, work: Path) -> dict[int, list[float]]:
    """The scores of all videos, and the accuracies, from 1, 2 and 4 processes."""
    found = {}
    for processes in (1, 2, 4):
        output = work / f"scores{processes}"
        flags = [model, "--data_dir", videos, "--batch_size", 2, "--num_crops", 3, "--output_dir", output]
        if processes == 1:
            statuses = [run(flags, work / "log", script="evaluate")]
        else:
            statuses = run_processes(processes, flags, work / "log", script="evaluate")
        check(not any(statuses), f"{processes} processes must evaluate, got {statuses}")
        rows = (output / "predictions.csv").read_text().splitlines()
        at = rows[0].split(",").index("score")
        results = json.loads((output / "results.json").read_text())
        scores = [float(row.split(",")[at]) for row in rows[1:]]
        found[processes] = [*scores, *(results[name] for name in ("top1", "top5", "mean_class_accuracy"))]
    return found


def struck(strike: str, flags: list, output: Path) -> tuple[str, float]:
    """A job of two processes to which `strike` happens; what it prints, and seconds from then to its end."""
    flags = [*flags, "--batch_size", GLOBAL_BATCH // 2, "--output_dir", output]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", STRUCK, *flags]
    at = output.with_name(f"{output.name}_struck")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "STRIKE": strike, "STRUCK_AT": str(at)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    end, says = time.time(), done.stdout + done.stderr
    check(at.exists() and done.returncode != 0, f"torchrun must fail after a {strike}, got {done.returncode}: {says}")
    seconds = end - at.stat().st_mtime
    check(seconds < 60, f"it must end within a minute, got {seconds} s")
    return says, seconds


def death(flags: list, work: Path) -> dict:
    """One of two processes dies: torchrun names it and ends."""
    says, seconds = struck("death", flags, work / "death")
    lines = [line for line in says.splitlines() if "exitcode" in line and "-9" in line]
    check(lines, f"torchrun must name what died, got {says}")
    check(len(losses(work / "death")) == 2, f"it must die before the third loss, got {losses(work / 'death')}")
    return {"seconds_until_torchrun_fails": seconds, "torchrun_says": lines[0].partition("] ")[2].partition(" (pid")[0]}


def scheduler(flags: list, work: Path) -> dict:
    """A scheduler's SIGTERM to all processes of a job: it saves, once, and goes on as if nothing had been."""
    output, flags = work / "scheduler", [*flags, "--num_workers", 1, *RARELY]
    says, seconds = struck("signal", flags, output)
    stopped = re.findall(r"^Stopped by SIGTERM after step (\d+);", says, re.MULTILINE)
    saved = saved_step(output)
    check(stopped == [str(saved)], f"it must say once that it saved step {saved}, got {says}")
    train(2, [*flags, "--resume"], output, work / "log")
    check_resumed(output, saved)
    apart = difference(losses(work / "of2"), losses(output))
    return {"seconds_until_a_signal_ends": seconds, "saved_at_a_signal": saved, "loss_difference_signalled": apart}


def long_run(work: Path, steps: int) -> list:
    """Flags of train.py without the batch size."""
    flags = make_inputs(work)
    at = flags.index("--batch_size")
    return [
        *flags[:at],
        *flags[at + 2 :],
        *f"--flip --max_steps {steps} --epochs 100 --checkpoint_every_steps 1".split(),
    ]


def measure(work: Path, steps: int, torchrun: int) -> dict:
    flags = long_run(work, steps)
    for processes in (1, 2, 4):
        train(processes, flags, work / f"of{processes}", work / "log")
    one = losses(work / "of1")
    result = {"steps": steps, "loss_first": one[0], "loss_last": one[-1]}
    result |= {f"loss_difference_{n}": difference(one, losses(work / f"of{n}")) for n in (2, 4)}
    result["loss_difference_4_then_2_then_1"] = difference(one, resumed_by_others(flags, work, steps))
    videos = shutil.copytree(work / "videos", work / "odd")
    (videos / "a" / "0.mp4").unlink()  # 11 videos: no number of processes divides them
    scores = evaluations(work / "of1" / "last", videos, work)
    result |= {f"evaluation_difference_{n}": difference(scores[1], scores[n]) for n in (2, 4)}
    if torchrun:
        result |= death(flags, work) | scheduler(flags, work)
    for name, value in result.items():
        if "difference" in name:
            limit = 1e-6 if name.startswith("evaluation") else 1e-5
            check(value <= limit, f"{name} must be at most {limit}, got {value}")
    return result


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, steps=20, torchrun=1)
