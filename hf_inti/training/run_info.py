"""run.json: the settings, versions and data of a run, and whether a resumed run has the same."""

import json
import sys
from dataclasses import asdict

from ..measure.records import commit, versions


# Settings that may change when a run is resumed: they decide where and how fast it runs, not its result.
FREE_SETTINGS = {
    "activation_checkpointing",
    "checkpoint_every_epochs",
    "checkpoint_every_steps",
    "eval_batch_size",
    "hub_private",
    "log_every_steps",
    "num_workers",
    "on_bad_video",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume",
}


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

    FREE_SETTINGS may differ. Values are compared as JSON, since `before` was read from a file.
    """
    runs = []
    for run in (before, now):
        data = {name: run[name] for name in ("num_processes", "train_fingerprint", "eval_fingerprint")}
        runs.append({**settings_of(run["arguments"]), **data})
    changed = first_change(*runs)
    if changed is not None:
        name, old, new = changed
        raise ValueError(
            f"{name} must be {old!r} as when the run began, got {new!r}; give that, or start a new run in another "
            "output_dir."
        )


def settings_of(arguments: dict[str, dict]) -> dict:
    """All settings by name, from run.json's "arguments"."""
    return {name: value for part in arguments.values() for name, value in part.items()}


def first_change(before: dict, now: dict) -> tuple[str, object, object] | None:
    """The first setting that decides a run's result and differs: its name, what it was and what it is; else None."""
    for name, value in json.loads(json.dumps(now)).items():
        if name not in FREE_SETTINGS and value != before.get(name):
            return name, before.get(name), value
    return None
