"""Train for 2,000 steps with 20 evaluations, and see that the memory of the process does not grow.

    python tests/reliability/steady.py --output results/reliability/steady.json

The resident set is noted after every hundred steps and evaluations; after a fifth of the run, in which caches fill, it
may grow by 2% at most.
"""

import json
import shutil
from pathlib import Path

import torch
from tiny import RANDOM, check, main, make_inputs, run

from hf_inti.measure.memory import held
from hf_inti.training.state import TrainingState


CPU = torch.device("cpu")
MOST = 1.02


def note_memory(file: Path) -> None:
    """Append step and resident set, in bytes, whenever the run records metrics."""
    record = TrainingState.record

    def replacement(self, **values):
        record(self, **values)
        with file.open("a") as stream:
            stream.write(json.dumps({"step": self.step, "eval": "eval_top1" in values, "bytes": held(CPU)}) + "\n")

    TrainingState.record = replacement


def measure(work: Path, steps: int, evaluations: int) -> dict:
    flags = [*make_inputs(work), *RANDOM, "--eval_dir", work / "videos", "--output_dir", work / "run"]
    per_epoch = 12 // 2 // 2  # videos, batch size, batches a step
    flags += ["--max_steps", steps, "--epochs", steps, "--log_every_steps", steps // evaluations]
    every = -(-steps // (per_epoch * evaluations))
    flags += ["--eval_every_epochs", every, "--checkpoint_every_epochs", every]
    check(run(flags, work / "log", lambda: note_memory(work / "memory")) == 0, (work / "log").read_text())
    notes = [json.loads(line) for line in (work / "memory").read_text().splitlines()]
    shutil.rmtree(work / "run")
    settled = [note["bytes"] for note in notes if note["step"] > steps // 5]
    result = {
        "steps": notes[-1]["step"],
        "evaluations": sum(note["eval"] for note in notes),
        "mib_settled": round(settled[0] / 2**20, 1),
        "mib_last": round(settled[-1] / 2**20, 1),
        "mib_most": round(max(settled) / 2**20, 1),
        "notes": [[note["step"], note["bytes"]] for note in notes],
    }
    check(result["evaluations"] >= evaluations - 1, f"{evaluations} evaluations are needed, got {result}")
    check(settled[-1] <= MOST * settled[0], f"memory must not grow by more than 2%, got {result}")
    return result


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, steps=2000, evaluations=20)
