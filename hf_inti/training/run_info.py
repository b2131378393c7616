"""run.json: the settings, versions and data of a run, and whether a resumed run has the same."""

import json
import math
import sys
from dataclasses import asdict

from ..measure.records import commit, versions


# Settings that may change when a run is resumed: they decide where and how fast it runs, not its result.
FREE_SETTINGS = {
    "activation_checkpointing",
    "allow_outside_root",
    "checkpoint_every_epochs",
    "checkpoint_every_steps",
    "eval_batch_size",
    "hub_private",
    "log_every_steps",
    "max_skipped_steps",
    "num_workers",
    "on_bad_video",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume",
}


# Their product is the global batch. The first two are a round of batches.
BATCH_FACTORS = ("num_processes", "batch_size", "gradient_accumulation_steps")


def describe_run(*arguments: object, **more: object) -> dict:
    """The contents of run.json: command, argument dataclasses by class name, versions, commit, and `more`."""
    return {
        "command": sys.argv,
        "arguments": {type(a).__name__: asdict(a) for a in arguments},
        "versions": versions(),
        "commit": commit(),
        **more,
    }


def check_same_run(before: dict, now: dict) -> None:
    """Raise a ValueError naming the first setting in which two results of `describe_run` differ.

    FREE_SETTINGS may differ, and the factors of the global batch if the product is the same. Values are compared as
    JSON, since `before` was read from a file.
    """
    runs = []
    for run in (before, now):
        data = {name: run[name] for name in ("num_processes", "train_fingerprint", "eval_fingerprint")}
        runs.append({**settings_of(run["arguments"]), **data})
    if math.prod(batch_factors(before)) == math.prod(batch_factors(now)):
        runs = [{name: value for name, value in run.items() if name not in BATCH_FACTORS} for run in runs]
    changed = first_change(*runs)
    if changed is not None:
        name, old, new = changed
        raise ValueError(
            f"{name} must be {old!r} as when the run began, got {new!r}; give that, or start a new run in another "
            "output_dir."
        )


def batch_factors(run: dict) -> tuple[int, ...]:
    """The values of BATCH_FACTORS in a result of `describe_run`."""
    values = {**settings_of(run["arguments"]), "num_processes": run["num_processes"]}
    return tuple(values.get(name, 1) for name in BATCH_FACTORS)


def same_videos(batches: int, before: dict, now: dict) -> int:
    """The number of batches per process that hold as many videos as `batches` did before.

    Raises ValueError where there is none, and for streams, which other processes read in other shares.
    """
    old, new = batch_factors(before)[:2], batch_factors(now)[:2]
    if batches == 0 or old == new:
        return batches
    count, rest = divmod(batches * math.prod(old), math.prod(new))
    if rest or settings_of(now["arguments"]).get("streaming"):
        raise ValueError(
            f"num_processes and batch_size must be {old[0]} and {old[1]} until this epoch ends, got {new[0]} and "
            f"{new[1]}, which cannot continue where it stopped; resume with those of before."
        )
    return count


def settings_of(arguments: dict[str, dict]) -> dict:
    """All settings by name, from run.json's "arguments"."""
    return {name: value for part in arguments.values() for name, value in part.items()}


def first_change(before: dict, now: dict) -> tuple[str, object, object] | None:
    """The first setting that decides a run's result and differs: its name, what it was and what it is; else None."""
    for name, value in json.loads(json.dumps(now)).items():
        if name not in FREE_SETTINGS and value != before.get(name):
            return name, before.get(name), value
    return None
