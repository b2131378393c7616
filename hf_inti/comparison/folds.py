"""Cross-validation over groups, such as speakers: no group has videos in both the training and the test of a fold."""

import csv
import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

from ..data.datasets import label_names_of, load_video_dataset
from ..data.layouts import INDEX, is_inside
from ..training.arguments import DataArguments


Videos = list[tuple[str, str]]  # a path relative to the folder of all videos, and a class


class Fold(NamedTuple):
    """The groups that one fold tests; the videos of all others train."""

    groups: list[str]
    train: Videos
    test: Videos
    source: str
    root: str
    folder: Path
    described: dict[str, str | None]

    @property
    def name(self) -> str:
        return "+".join(self.groups)

    @property
    def settings(self) -> dict[str, str]:
        """Those of train.py that read the lists."""
        places = {"train_dir": self.folder / "train.csv", "eval_dir": self.folder / "test.csv"}
        return {**{name: str(path) for name, path in places.items()}, "layout": "list", "video_root": self.root}

    def write(self) -> None:
        """Write both lists, each at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, videos in (("train", self.train), ("test", self.test)):
            part = self.folder / f"{name}.csv.part"
            with part.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("video", "label"), *videos])
            os.replace(part, self.folder / f"{name}.csv")


def check_folds(group: str | None, folds: list[str] | None) -> list[list[str]] | None:
    """The groups of each fold, from `folds` as flags or recipes give them: a YAML list each.

    Raises ValueError for an expression without parentheses, folds that are no lists, or a group in two of them.
    """
    if group is None:
        if folds is not None:
            raise ValueError("folds must be left out without group; give the expression that tells a video's group.")
        return None
    try:
        has_groups = re.compile(group).groups > 0
    except re.error as error:
        raise ValueError(f"group must be a regular expression, got {group!r}: {error}.") from None
    if not has_groups:
        raise ValueError(f"group must have parentheses around what tells the group, got {group!r}; add them.")
    if folds is None:
        return None
    try:
        found = [yaml.safe_load(text) for text in folds]
    except yaml.YAMLError:
        found = [None]
    if not all(isinstance(fold, list) and fold for fold in found) or not found:
        raise ValueError(f"folds must be lists of groups, such as [F01, F02], got {folds}; give a list for each fold.")
    found = [[str(name) for name in fold] for fold in found]
    twice = [name for name, count in Counter(sum(found, [])).items() if count > 1]
    if twice:
        raise ValueError(
            f"folds must test no group twice, got {twice[0]!r} more than once; take it out of all but one."
        )
    return found


def split_by_group(data: DataArguments, group: str, folds: list[list[str]] | None, folder: Path) -> list[Fold]:
    """The folds of the videos of `data.train_dir`; without `folds` each group is tested once. Writes nothing yet.

    `group` is searched in each file's name, its first parenthesis is the group. `folder` is for the lists. Raises
    ValueError for videos without a group, groups without videos, and classes that a fold could not learn.
    """
    root, videos = read_videos(data)
    members: dict[str, Videos] = {}
    for path, label in videos:
        match = re.search(group, os.path.basename(path))
        if match is None or not match[1]:
            raise ValueError(f"group must be found in every file name, got {group!r}, not in {path}; change it.")
        members.setdefault(match[1], []).append((path, label))
    if len(members) < 2:
        raise ValueError(f"videos must be of at least two groups, got {list(members)} by {group!r}; change it.")
    found = folds or [[name] for name in sorted(members)]
    if unknown := [name for names in found for name in names if name not in members]:
        known = ", ".join(sorted(members))
        raise ValueError(f"folds must name groups of the videos, got {unknown[0]!r}; there are {known}.")
    result = []
    for names in found:
        test = [video for name in names for video in members[name]]
        train = [video for name, of_group in members.items() if name not in names for video in of_group]
        if lost := sorted({label for _, label in videos} - {label for _, label in train}):
            raise ValueError(
                f"every class must have training videos in every fold, got none of {lost[0]!r} where "
                f"{', '.join(names)} is tested; test fewer groups in one fold, or leave the class out."
            )
        described = {"train_dir": describe(train, root), "eval_dir": describe(test, root), "video_root": None}
        fold = Fold(names, train, test, data.train_dir, root, folder, described)
        result.append(fold._replace(folder=folder / fold.name))
    return result


def read_videos(data: DataArguments) -> tuple[str, Videos]:
    """The folder of all training videos, and their paths relative to it with their classes."""
    place = {"video_root": data.video_root, "allow_outside_root": data.allow_outside_root}
    dataset = load_video_dataset(data.train_dir, layout=data.layout, split=data.train_split, **place)
    clips, names = dataset["video"][:], label_names_of(dataset)
    if any(clip["bytes"] is not None or clip["path"] is None for clip in clips):
        raise ValueError(f"videos must be files to be grouped by their names, got {data.train_dir}; unpack it.")
    labels = [names[label] for label in dataset["label"][:]]
    numbers = [name for name in sorted(set(labels)) if re.fullmatch(INDEX, name)]
    if numbers and len(numbers) < len(set(labels)):  # a list of the former alone would be read as numbered classes
        raise ValueError(f"classes must be all names or all numbers, got {numbers[0]!r} among names; rename it.")
    source = os.fspath(data.train_dir)
    beside = source if os.path.isdir(source) else os.path.dirname(source) or "."
    inside = all(is_inside(clip["path"], beside) for clip in clips)
    root = beside if inside else data.video_root or beside
    return root, [(os.path.relpath(clip["path"], root), label) for clip, label in zip(clips, labels, strict=True)]


def describe(videos: Videos, root: str) -> str:
    """The number of videos and a fingerprint of their names, classes and sizes, wherever they lie."""
    files = [Path(root, name) for name, _ in videos]
    sizes = [file.stat().st_size if file.exists() else None for file in files]
    parts = [(Path(name).as_posix(), label, size) for (name, label), size in zip(videos, sizes, strict=True)]
    return f"{len(videos)} videos, {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
