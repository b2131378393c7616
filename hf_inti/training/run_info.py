"""run.json: the settings, versions and data of a run, and whether a resumed run has the same."""

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "av", "kornia")
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
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(),
        **more,
    }


def check_same_run(before: dict, now: dict) -> None:
    """Raise a ValueError naming the first setting in which two results of `describe_run` differ.

    FREE_SETTINGS may differ. Values are compared as JSON, since `before` was read from a file.
    """
    before, now = _decisive(before), _decisive(json.loads(json.dumps(now)))
    for name, value in now.items():
        if value != before.get(name):
            raise ValueError(
                f"{name} must be {before.get(name)!r} as when the run began, got {value!r}; "
                "give that, or start a new run in another output_dir."
            )


def _decisive(run: dict) -> dict:
    settings = {name: value for part in run["arguments"].values() for name, value in part.items()}
    settings = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    return {**settings, **{name: run[name] for name in ("num_processes", "train_fingerprint", "eval_fingerprint")}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed from a wheel, perhaps inside some other repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
