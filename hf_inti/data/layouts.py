"""The videos of a dataset on disk and their classes, read from class folders or the benchmarks' list files.

Every `read_*` function returns rows `(candidates, label)`, and the class names if the source itself has them:
`candidates` are the paths where the video may be, relative to `video_root`, most likely first; `label` is a class
name or an index. Nothing here opens a video.
"""

import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterable, Sequence


VIDEO_EXTENSIONS = tuple("mp4 webm avi mkv mov mpeg mpg m4v wmv flv 3gp ts ogv".split())
LAYOUTS = ("folder", "list", "kinetics", "ssv2", "ucf101", "hmdb51", "webdataset", "hub")
# The files that identify a folder's layout; a folder without any is read as class folders.
SIGNS = {
    "ucf101": r"classInd\.txt",
    "hmdb51": r".+_test_split\d\.txt",
    "webdataset": r".+\.tar",
    "hub": r".+\.parquet",
}
PATH_COLUMNS = ("video", "path", "video_path", "file_path", "file_name", "filename", "file")
# Synonyms: "val" matches a folder called "validation", but never one called "test".
SPLITS = ({"train", "training"}, {"val", "valid", "validation", "validate"}, {"test", "testing"})
KINETICS_COLUMNS = {"youtube_id", "time_start", "time_end"}
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
INDEX = r"-?[0-9]+"  # -1 often means "no label"; if it were read as a class name, all classes would be renumbered

Rows = list[tuple[list[str], str | int]]  # (candidates, label) of each video


def detect_layout(source: str | os.PathLike) -> str:
    """The layout, one of LAYOUTS, of a folder, file, shards or Hub id. Raises ValueError if it is unclear."""
    source = os.fspath(source)
    if source.endswith(".tar"):
        return "webdataset"
    if os.path.isdir(source):
        files = [*_names(source), *_names(os.path.join(source, "data"))]  # push_to_hub writes to data/
        found = [layout for layout, form in SIGNS.items() if any(re.fullmatch(form, name) for name in files)]
        if not found or any(_class_folders(source).values()):
            found.append("folder")
    elif os.path.isfile(source):
        found = [_detect_list(source)]
    elif glob.glob(source) and all(re.search(r"_test_split\d\.txt$", name) for name in glob.glob(source)):
        found = ["hmdb51"]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        found = ["hub"]
    else:
        raise ValueError(
            f"source must be a file, a folder or a Hub dataset id (owner/name), got {source}: no such file or folder; "
            f"give one of these, or its layout= ({', '.join(LAYOUTS)})."
        )
    if len(found) > 1:
        raise ValueError(
            f"{source} must fit one layout, got {' and '.join(found)}; choose with layout= "
            f"(one of {', '.join(LAYOUTS)})."
        )
    return found[0]


def _detect_list(source: str) -> str:
    if source.endswith((".json", ".jsonl")):
        first = read_json(source)[0]
        return "ssv2" if {"id", "template"} <= first.keys() else "list"
    if re.fullmatch(r"(train|test)list\d+\.txt", os.path.basename(source)):
        return "ucf101"
    if re.fullmatch(SIGNS["hmdb51"], os.path.basename(source)):
        return "hmdb51"  # the file of one class; as a plain list, its train and test marks would be read as classes
    return "kinetics" if KINETICS_COLUMNS <= set(_header(source)) else "list"


def locate(rows: Rows, video_root: str | os.PathLike, allow_outside_root: bool = False) -> list[str]:
    """Paths of the rows' videos: the first candidate that exists, else the first one.

    A missing file keeps its row: decoding reports it. Raises ValueError if none of the files exists, or if a path leads
    out of `video_root` (links may) without `allow_outside_root`: a list may come from somebody else. URLs are refused:
    what opens them reads parts of a path as places of their own.
    """
    paths, found = [], False
    for candidates, _ in rows:
        tried = [os.path.join(video_root, name) for name in candidates]
        outside = [] if allow_outside_root else [path for path in tried if not is_inside(path, video_root)]
        if outside:
            raise ValueError(
                f"listed videos must be in video_root, {video_root}, got {outside[0]}; set video_root to a folder that "
                "holds them all, or allow_outside_root if you trust the list."
            )
        if url := next((path for path in tried if "://" in path), None):
            raise ValueError(f"listed videos must be files, got {url}; download it, and list the file.")
        if name := next((path for path in tried if path != printable(path)), None):
            raise ValueError(f"names of videos must be UTF-8, got another encoding in {printable(name)}; rename it.")
        path = next((name for name in tried if os.path.exists(name)), None)
        found = found or path is not None
        paths.append(path or tried[0])
    if not found:
        tried = [os.path.join(video_root, name) for candidates, _ in rows[:2] for name in candidates][:2]
        raise ValueError(
            f"video_root must hold the listed videos, got {video_root}, which has none of the {len(rows)}: tried "
            f"{' and '.join(tried)}; set video_root= to the folder that holds them."
        )
    return paths


def printable(name: str) -> str:
    """The name with escapes for what is not UTF-8: Arrow has no such strings."""
    return name.encode(errors="backslashreplace").decode()


def is_inside(path: str, folder: str | os.PathLike) -> bool:
    """Whether the path as written, links not followed, lies in the folder."""
    folder = os.path.abspath(folder)
    return os.path.commonpath([folder, os.path.abspath(path)]) == folder


def check_row(path: str, folders: Sequence[str | os.PathLike]) -> None:
    """Raise a ValueError unless a row of a dataset may name this place: in one of the folders, or on the Hub.

    Either may be an archive: "zip://a.mp4::hf://datasets/org/name/videos.zip".
    """
    *inside, place = path.split("::")
    archives = all(part.partition("://")[0] in ARCHIVES for part in inside)
    if place.startswith("hf://"):
        known = True
    else:
        known = "://" not in place and any(is_inside(place, folder) for folder in folders)
    if not archives or not known:
        raise ValueError(
            f"the dataset's videos must be in it or on the Hub, got {path[:200]}; set allow_outside_root if you trust "
            "the dataset."
        )


def number_labels(labels: Sequence[str | int], names: Sequence[str] | None = None) -> tuple[list[int], list[str]]:
    """`(indices, names)` of labels that are indices already, or names (numbered by `names`, else sorted).

    Raises ValueError if a label is outside `names`.
    """
    if all(isinstance(label, int) for label in labels):
        names = list(names or map(str, range(max(labels) + 1)))
        index = {i: i for i in range(len(names))}
    else:
        labels = [str(label) for label in labels]
        names = list(names or sorted(set(labels)))
        index = {name: i for i, name in enumerate(names)}
    unknown = sorted({label for label in labels if label not in index}, key=str)
    if unknown:
        raise ValueError(
            f"labels must be among the {len(names)} classes {names[:3]}..., got {unknown[:5]}; "
            "give label_names= for all classes, or leave these videos out."
        )
    return [index[label] for label in labels], names


def read_folder(source: str, split: str) -> tuple[Rows, list[str]]:
    """`source/<class>/**/*`, or `source/<split>/<class>/**/*` where there are folders named after splits."""
    words = [name for name in _subfolders(source) if any(name.lower() in words for words in SPLITS)]
    splits = [name for name in words if _subfolders(os.path.join(source, name))] or [""]
    classes = {name: _class_folders(os.path.join(source, name)) for name in splits}
    folder = _choose_split(source, splits, split) if splits != [""] else ""
    # The names come from all splits, so that a class has the same index in each.
    names = sorted({name for split in classes.values() for name, videos in split.items() if videos})
    rows = [([video], name) for name, videos in sorted(classes[folder].items()) for video in videos]
    if not rows:
        raise ValueError(
            f"{os.path.join(source, folder)} must hold videos in class folders, "
            f"<class>/**/*.({'|'.join(VIDEO_EXTENSIONS)}), got none; correct the path or choose another layout=."
        )
    return rows, names


def read_kinetics(source: str, split: str) -> tuple[Rows, None]:
    """Kinetics' official csv (label, youtube_id, time_start, time_end, split): <id>_<start>_<end>.mp4."""
    table = read_csv(source)
    if "label" not in table[0]:
        raise ValueError(f"{source} must have a column 'label', got {list(table[0])}; give a labelled list.")
    splits = sorted({row["split"] for row in table if row.get("split")})
    if len(splits) > 1:  # a file of one split is read whole
        chosen = _choose_split(source, splits, split)
        table = [row for row in table if row["split"] == chosen]
    rows = []
    for row in table:
        try:
            start, end = (int(float(row[column])) for column in ("time_start", "time_end"))
        except (TypeError, ValueError):
            message = f"{source} must give time_start and time_end in seconds, got {row}; fix this row."
            raise ValueError(message) from None
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
        folders = dict.fromkeys((row["label"], row["label"].replace(" ", "_")))
        rows.append(([name, *(os.path.join(folder, name) for folder in folders)], row["label"]))
    return rows, None


def read_ssv2(source: str, label_names: Sequence[str] | None) -> tuple[Rows, Sequence[str]]:
    """Something-Something v2's official json; the json of its classes (template -> index) is in the same folder."""
    names = label_names
    if names is None:
        files = glob.glob(os.path.join(glob.escape(os.path.dirname(source)), "*labels*.json"))
        if len(files) != 1:
            raise ValueError(f"{source} must have one *labels*.json in its folder, got {files}; give label_names=.")
        numbers = json.loads(_text(files[0]))
        names = sorted(numbers, key=lambda name: int(numbers[name]))
    rows = []
    for row in read_json(source):
        if "template" not in row:
            raise ValueError(
                f"{source} must give the template (label) of every video, got none for {row.get('id')}; "
                "give a labelled list."
            )
        file = f"{row['id']}.webm"
        candidates = [file, os.path.join("20bn-something-something-v2", file), f"{row['id']}.mp4"]
        rows.append((candidates, re.sub(r"[\[\]]", "", row["template"])))
    return rows, names


def read_ucf101(source: str, split: str) -> tuple[Rows, list[str]]:
    """UCF101's official trainlist01.txt or testlist01.txt (or their folder: fold 1), with classInd.txt."""
    if os.path.isdir(source):
        source = os.path.join(source, "trainlist01.txt" if _same_split(split, "train") else "testlist01.txt")
    names = [line.split()[1] for line in read_lines(os.path.join(os.path.dirname(source), "classInd.txt"))]
    files = [line.split()[0] for line in read_lines(source)]  # the class numbers of training lists are redundant
    return [([name, os.path.basename(name)], name.split("/")[0]) for name in files], names


def read_hmdb51(source: str, split: str) -> tuple[Rows, list[str]]:
    """HMDB51's official <class>_test_split<k>.txt: a folder (its fold 1) or a pattern (*_test_split2.txt)."""
    pattern = os.path.join(glob.escape(source), "*_test_split1.txt") if os.path.isdir(source) else source
    wanted = "1" if _same_split(split, "train") else "2"  # 0: not used in this fold
    rows, names = [], []
    for file in sorted(glob.glob(pattern)):
        names.append(re.sub(r"_test_split\d\.txt$", "", os.path.basename(file)))
        for line in read_lines(file):
            name, _, use = line.rpartition(" ")
            if not name or use not in ("0", "1", "2"):
                raise ValueError(f"{file} must hold lines 'name 0', 'name 1' or 'name 2', got {line!r}; fix this line.")
            if use == wanted:
                rows.append(([os.path.join(names[-1], name), name], names[-1]))
    if not rows:
        raise ValueError(
            f"{source} must hold videos of split {split!r}, got none in {pattern}; give their folder or pattern."
        )
    return rows, names


def read_list(source: str, video_column: str, label_column: str) -> tuple[Rows, None]:
    """A csv, json, jsonl with named columns, or lines `path label` / `path,label` without a header."""
    if source.endswith((".json", ".jsonl")):
        table = read_json(source)
    elif label_column in _header(source):
        table = read_csv(source)
    else:
        # The path ends at its extension: both paths and class names may contain spaces.
        form = rf"(.+?\.(?:{'|'.join(VIDEO_EXTENSIONS)}))(?:\s*[,;]\s*|\s+)(\S.*)"
        pairs = []
        for line in read_lines(source):
            match = re.fullmatch(form, line, re.IGNORECASE)
            pair = [cell.strip() for cell in _cells(source, line)[0]] if '"' in line else []
            if len(pair) != 2 and match is None:
                raise ValueError(
                    f"{source} must hold lines 'path label' or 'path,label', or a header with the columns "
                    f"{video_column!r} and {label_column!r}, got {line!r}; fix this line, or name the columns with "
                    "video_column= and label_column=."
                )
            pairs.append(pair if len(pair) == 2 else match.groups())
        return _rows(source, pairs), None
    columns = list(table[0])
    path_column = next((name for name in (video_column, *PATH_COLUMNS) if name in columns), None)
    if path_column is None or label_column not in columns:
        raise ValueError(
            f"{source} must have the columns {video_column!r} and {label_column!r}, got {columns}; "
            "name them with video_column= and label_column=."
        )
    return _rows(source, [(row.get(path_column), row.get(label_column)) for row in table]), None


def _rows(source: str, pairs: Iterable[tuple]) -> Rows:
    for path, label in pairs:
        if path in (None, "") or label in (None, ""):
            raise ValueError(
                f"{source} must give a path and a label for every video, got {path!r} and {label!r}; fix this line."
            )
    labels = [str(label).strip() for _, label in pairs]
    if all(re.fullmatch(INDEX, label) for label in labels):
        labels = [int(label) for label in labels]
    return [([str(path)], label) for (path, _), label in zip(pairs, labels, strict=True)]


def expand_braces(pattern: str) -> list[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [p for i in numbers for p in expand_braces(pattern[: match.start()] + i + pattern[match.end() :])]


def _text(path: str) -> str:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a BOM
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"{path} must exist, got no such file; put it there or choose another layout=.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} must be a list of videos, got a folder; choose another layout=.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a list of videos in UTF-8, got another encoding; save it as UTF-8.") from None


def read_lines(path: str) -> list[str]:
    lines = [line.strip() for line in re.split(r"[\r\n]+", _text(path)) if line.strip()]
    if not lines:
        raise ValueError(f"{path} must hold one entry per line, got an empty file; give a list that has them.")
    return lines


def _cells(path: str, text: str) -> list[list[str]]:
    """The rows of a csv or of a line of it."""
    lines = io.StringIO(text, newline="").readlines()
    rows = csv.reader(lines, skipinitialspace=True)
    try:
        return [row for row in rows if row]
    except csv.Error as error:
        raise ValueError(
            f"{path} must be a csv, got {error} in line {lines[rows.line_num - 1][:40]!r}...; shorten this cell, or "
            "close the quotes above it."
        ) from None


def _header(path: str) -> list[str]:
    return [name.strip() for name in _cells(path, read_lines(path)[0])[0]]


def read_csv(path: str) -> list[dict]:
    names, *rows = _cells(path, _text(path).strip()) or [[]]
    if not rows:
        raise ValueError(f"{path} must hold one video per line below its header, got none; give a list that has them.")
    names = [name.strip() for name in names]
    return [dict(zip(names, row + [None] * len(names), strict=False)) for row in rows]


def read_json(path: str) -> list[dict]:
    try:
        rows = [json.loads(line) for line in read_lines(path)] if path.endswith("l") else json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be valid JSON, got a syntax error ({error}); fix the file.") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must be a JSON list of objects, one per video, got {repr(rows)[:60]}; fix the file.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            got = f"{repr(row)[:60]} for video {number}"
            raise ValueError(f"{path} must hold an object for every video, got {got}; fix this row.")
    return rows


def _same_split(name: str, split: str) -> bool:
    return name == split or any({name.lower(), split.lower()} <= words for words in SPLITS)


def _choose_split(source: str, splits: list[str], split: str) -> str:
    chosen = [name for name in splits if name == split]
    chosen += [name for name in splits if _same_split(name, split)]
    if not chosen:
        raise ValueError(f"split must be one of {splits} for {source}, got {split!r}; choose one of these.")
    return chosen[0]


def _names(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _subfolders(folder: str) -> list[str]:
    return [name for name in _names(folder) if os.path.isdir(os.path.join(folder, name))]


def _class_folders(folder: str) -> dict[str, list[str]]:
    """{class: its videos, sorted}. Follows links (each folder once) and skips hidden files and folders."""
    classes = {}
    for name in _subfolders(folder):
        videos, seen = [], set()
        for path, folders, files in os.walk(os.path.join(folder, name), followlinks=True):
            if os.path.realpath(path) in seen:  # a link to a parent folder
                folders.clear()
                continue
            seen.add(os.path.realpath(path))
            folders[:] = [sub for sub in folders if not sub.startswith(".")]
            videos += [
                os.path.join(path, file)
                for file in files
                if not file.startswith(".") and file.lower().rpartition(".")[2] in VIDEO_EXTENSIONS
            ]
        classes[name] = sorted(videos)
    return classes
