"""Which videos a dataset on disk holds, with their classes: class folders and benchmarks' list files.

Every `read_*` function returns rows `(candidates, label)` and the class names if the source itself has them:
`candidates` are the places where the video may lie, relative to `video_root`, best first; `label` is a class
name or an index. Nothing here opens a video.
"""

import csv
import glob
import io
import json
import os
import re


VIDEO_EXTENSIONS = tuple("mp4 webm avi mkv mov mpeg mpg m4v wmv flv 3gp ts ogv".split())
LAYOUTS = ("folder", "list", "kinetics", "ssv2", "ucf101", "hmdb51", "webdataset", "hub")
# The files that give a folder's layout away; one without any is taken for class folders.
SIGNS = {
    "ucf101": r"classInd\.txt",
    "hmdb51": r".+_test_split\d\.txt",
    "webdataset": r".+\.tar",
    "hub": r".+\.parquet",
}
PATH_COLUMNS = ("video", "path", "video_path", "file_path", "file_name", "filename", "file")
# Words for the same split: "val" finds a folder called "validation", but never the one called "test".
SPLITS = ({"train", "training"}, {"val", "valid", "validation", "validate"}, {"test", "testing"})
KINETICS_COLUMNS = {"youtube_id", "time_start", "time_end"}
INDEX = r"-?[0-9]+"  # some write -1 for "no label": as the name of a class, it would renumber all the others


def detect_layout(source):
    """The layout, one of LAYOUTS, of a folder, file, shards or Hub id; ValueError if that is unclear."""
    source = os.fspath(source)
    if source.endswith(".tar"):
        return "webdataset"
    if os.path.isdir(source):
        files = [*_names(source), *_names(os.path.join(source, "data"))]  # data/: as push_to_hub lays it out
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
            f"{source}: no such file or folder, and no Hub dataset id (owner/name); "
            f"give one of these, or its layout= ({', '.join(LAYOUTS)})"
        )
    if len(found) > 1:
        raise ValueError(
            f"{source}: could be {' or '.join(found)}; say which with layout= (one of {', '.join(LAYOUTS)})"
        )
    return found[0]


def _detect_list(source):
    if source.endswith((".json", ".jsonl")):
        first = _read_json(source)[0]
        return "ssv2" if {"id", "template"} <= first.keys() else "list"
    if re.fullmatch(r"(train|test)list\d+\.txt", os.path.basename(source)):
        return "ucf101"
    if re.fullmatch(SIGNS["hmdb51"], os.path.basename(source)):
        return "hmdb51"  # of one class; as a list, its marks of train and test would pass for classes
    return "kinetics" if KINETICS_COLUMNS <= set(_header(source)) else "list"


def locate(rows, video_root):
    """Paths of the rows' videos: the first candidate that exists, else the first one.

    A file that is not there keeps its row, for decoding to report; that none is there is a ValueError.
    """
    paths, found = [], False
    for candidates, _ in rows:
        tried = [os.path.join(video_root, name) for name in candidates]
        path = next((name for name in tried if os.path.exists(name)), None)
        found = found or path is not None
        paths.append(path or tried[0])
    if not found:
        tried = [os.path.join(video_root, name) for candidates, _ in rows[:2] for name in candidates][:2]
        raise ValueError(
            f"none of the {len(rows)} listed videos exists under video_root {video_root}: "
            f"tried {' and '.join(tried)}; give video_root= the folder that holds them"
        )
    return paths


def number_labels(labels, names=None):
    """`(indices, names)` of labels that are indices already, or names (numbered by `names`, else sorted)."""
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
            f"labels {unknown[:5]} are not among the {len(names)} classes {names[:3]}...; "
            "give label_names= for all classes, or leave these videos out"
        )
    return [index[label] for label in labels], names


def read_folder(source, split):
    """`source/<class>/**/*`, or `source/<split>/<class>/**/*` where there are folders named as splits."""
    words = [name for name in _subfolders(source) if any(name.lower() in words for words in SPLITS)]
    splits = [name for name in words if _subfolders(os.path.join(source, name))] or [""]
    classes = {name: _class_folders(os.path.join(source, name)) for name in splits}
    folder = _choose_split(source, splits, split) if splits != [""] else ""
    # Named after all splits, so that a class has one index, whichever split is read.
    names = sorted({name for split in classes.values() for name, videos in split.items() if videos})
    rows = [([video], name) for name, videos in sorted(classes[folder].items()) for video in videos]
    if not rows:
        raise ValueError(
            f"{os.path.join(source, folder)}: no videos found in class folders; "
            f"looked for <class>/**/*.({'|'.join(VIDEO_EXTENSIONS)}) there"
        )
    return rows, names


def read_kinetics(source, split):
    """Kinetics' official csv (label, youtube_id, time_start, time_end, split): <id>_<start>_<end>.mp4."""
    table = _read_csv(source)
    if "label" not in table[0]:
        raise ValueError(f"{source}: wanted a column 'label', got {list(table[0])}; give a labelled list")
    splits = sorted({row["split"] for row in table if row.get("split")})
    if len(splits) > 1:  # a file of one split is taken as it is
        chosen = _choose_split(source, splits, split)
        table = [row for row in table if row["split"] == chosen]
    rows = []
    for row in table:
        try:
            start, end = (int(float(row[column])) for column in ("time_start", "time_end"))
        except (TypeError, ValueError):
            raise ValueError(f"{source}: wanted seconds as time_start and time_end, got {row}; mend it") from None
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
        folders = dict.fromkeys((row["label"], row["label"].replace(" ", "_")))
        rows.append(([name, *(os.path.join(folder, name) for folder in folders)], row["label"]))
    return rows, None


def read_ssv2(source, label_names):
    """Something-Something v2's official json; the classes' own json (template -> index) lies beside it."""
    names = label_names
    if names is None:
        beside = glob.glob(os.path.join(glob.escape(os.path.dirname(source)), "*labels*.json"))
        if len(beside) != 1:
            raise ValueError(f"{source}: wanted one *labels*.json beside it, got {beside}; give label_names=")
        numbers = json.loads(_text(beside[0]))
        names = sorted(numbers, key=lambda name: int(numbers[name]))
    rows = []
    for row in _read_json(source):
        if "template" not in row:
            raise ValueError(f"{source}: video {row.get('id')} has no template (label); give a labelled list")
        file = f"{row['id']}.webm"
        candidates = [file, os.path.join("20bn-something-something-v2", file), f"{row['id']}.mp4"]
        rows.append((candidates, re.sub(r"[\[\]]", "", row["template"])))
    return rows, names


def read_ucf101(source, split):
    """UCF101's official trainlist01.txt or testlist01.txt (or their folder: fold 1), with classInd.txt."""
    if os.path.isdir(source):
        source = os.path.join(source, "trainlist01.txt" if _same_split(split, "train") else "testlist01.txt")
    names = [line.split()[1] for line in _lines(os.path.join(os.path.dirname(source), "classInd.txt"))]
    files = [line.split()[0] for line in _lines(source)]  # the numbers in training lists say nothing new
    return [([name, os.path.basename(name)], name.split("/")[0]) for name in files], names


def read_hmdb51(source, split):
    """HMDB51's official <class>_test_split<k>.txt: a folder (its fold 1) or a pattern (*_test_split2.txt)."""
    pattern = os.path.join(glob.escape(source), "*_test_split1.txt") if os.path.isdir(source) else source
    wanted = "1" if _same_split(split, "train") else "2"  # 0: in neither half of this fold
    rows, names = [], []
    for file in sorted(glob.glob(pattern)):
        names.append(re.sub(r"_test_split\d\.txt$", "", os.path.basename(file)))
        for line in _lines(file):
            name, _, use = line.rpartition(" ")
            if not name or use not in ("0", "1", "2"):
                raise ValueError(f"{file}: wanted lines 'name 0', 'name 1' or 'name 2', got {line!r}; mend it")
            if use == wanted:
                rows.append(([os.path.join(names[-1], name), name], names[-1]))
    if not rows:
        raise ValueError(f"{source}: no videos of split {split!r} in {pattern}; give their folder or pattern")
    return rows, names


def read_list(source, video_column, label_column):
    """A csv, json, jsonl with named columns, or lines `path label` / `path,label` without a header."""
    if source.endswith((".json", ".jsonl")):
        table = _read_json(source)
    elif label_column in _header(source):
        table = _read_csv(source)
    else:
        # The extension marks the end of the path: paths and class names may both hold spaces.
        form = rf"(.+?\.(?:{'|'.join(VIDEO_EXTENSIONS)}))(?:\s*[,;]\s*|\s+)(\S.*)"
        pairs = []
        for line in _lines(source):
            match = re.fullmatch(form, line, re.IGNORECASE)
            pair = _cells(line) if '"' in line else []
            if len(pair) != 2 and match is None:
                raise ValueError(
                    f"{source}: wanted lines 'path label' or 'path,label', or a header with the columns "
                    f"{video_column!r} and {label_column!r}, got {line!r}"
                )
            pairs.append(pair if len(pair) == 2 else match.groups())
        return _rows(source, pairs), None
    columns = list(table[0])
    path_column = next((name for name in (video_column, *PATH_COLUMNS) if name in columns), None)
    if path_column is None or label_column not in columns:
        raise ValueError(
            f"{source}: wanted the columns {video_column!r} and {label_column!r}, got {columns}; "
            "name them with video_column= and label_column="
        )
    return _rows(source, [(row.get(path_column), row.get(label_column)) for row in table]), None


def _rows(source, pairs):
    for path, label in pairs:
        if path in (None, "") or label in (None, ""):
            raise ValueError(f"{source}: wanted a path and a label, got {path!r} and {label!r}; mend this line")
    labels = [str(label).strip() for _, label in pairs]
    if all(re.fullmatch(INDEX, label) for label in labels):
        labels = [int(label) for label in labels]
    return [([str(path)], label) for (path, _), label in zip(pairs, labels, strict=True)]


def _text(path):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before the text
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"{path}: this list is missing; put it there or choose another layout=") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: wanted a list of videos, got a folder; choose another layout=") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: wanted a list of videos, got no UTF-8 text; save it as UTF-8") from None


def _lines(path):
    lines = [line.strip() for line in re.split(r"[\r\n]+", _text(path)) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the list is empty; wanted one video per line")
    return lines


def _cells(line):
    return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True))]


def _header(path):
    return _cells(_lines(path)[0])


def _read_csv(path):
    rows = csv.DictReader(io.StringIO(_text(path).strip(), newline=""), skipinitialspace=True)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
    rows = list(rows)
    if not rows:
        raise ValueError(f"{path}: the list is empty below its header; wanted one video per line")
    return rows


def _read_json(path):
    try:
        rows = [json.loads(line) for line in _lines(path)] if path.endswith("l") else json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: wanted json, got what is none ({error}); mend it") from None
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise ValueError(f"{path}: wanted a json list of objects, one per video, got {str(rows)[:60]}")
    return rows


def _same_split(name, split):
    return name == split or any({name.lower(), split.lower()} <= words for words in SPLITS)


def _choose_split(source, splits, split):
    chosen = [name for name in splits if name == split]
    chosen += [name for name in splits if _same_split(name, split)]
    if not chosen:
        raise ValueError(f"{source}: wanted split {split!r}, got {splits}; choose one of these with split=")
    return chosen[0]


def _names(folder):
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _subfolders(folder):
    return [name for name in _names(folder) if os.path.isdir(os.path.join(folder, name))]


def _class_folders(folder):
    """{class: its videos, sorted}, links followed (each folder once), hidden files and folders left out."""
    classes = {}
    for name in _subfolders(folder):
        videos, seen = [], set()
        for place, folders, files in os.walk(os.path.join(folder, name), followlinks=True):
            if os.path.realpath(place) in seen:  # a link to a folder above it
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            folders[:] = [sub for sub in folders if not sub.startswith(".")]
            videos += [
                os.path.join(place, file)
                for file in files
                if not file.startswith(".") and file.lower().rpartition(".")[2] in VIDEO_EXTENSIONS
            ]
        classes[name] = sorted(videos)
    return classes
