"""Videos with classes as Hugging Face datasets: rows {"video": {"path", "bytes"}, "label"}; nothing is decoded."""

import functools
import glob
import os
import re
import tarfile

import datasets
import pyarrow.compute as pc
from datasets import ClassLabel, Features, Value, Video

from . import layouts as video_lists


def load_video_dataset(
    source,
    *,
    layout="auto",
    split="train",
    video_root=None,
    label_names=None,
    streaming=False,
    video_column="video",
    label_column="label",
    cache_dir=None,
):
    """A dataset with the columns `video` (Video(decode=False): path and bytes) and `label` (ClassLabel).

    - `source`: class folders (with or without train/val/test above them), a list file, a folder of UCF101's
      or HMDB51's lists, tar shards ("x-{000..015}.tar", "x-*.tar" or a folder), or a dataset that
      `datasets.load_dataset` takes (a Hub id, a folder of parquet). `layout` is one of `video_lists.LAYOUTS`.
    - `split`: which part, where the source has parts; a source without parts is taken whole.
    - `video_root`: where listed videos lie; by default the list's folder.
    - `label_names`: the classes in order; by default the source's own, else the sorted names.
    - `cache_dir`: for the copies that `load_dataset` makes of shards and Hub data.

    Listed files that are missing stay in: decoding reports them. Shards streamed without names keep labels
    as plain int64. Raises ValueError if the layout is unclear, nothing is found, or a label is outside the
    classes.
    """
    source = os.fspath(source)
    if os.path.exists(source):
        source = os.path.abspath(source)  # rows hold paths, which must not be taken for relative to video_root
    if layout == "auto":
        layout = video_lists.detect_layout(source)
    if layout not in video_lists.LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; use auto or one of {', '.join(video_lists.LAYOUTS)}")
    if layout == "webdataset":
        dataset = _load_shards(source, streaming, cache_dir)
        return _two_columns(dataset, video_column, label_column, label_names)
    if layout == "hub":
        dataset = datasets.load_dataset(source, split=split, streaming=streaming, cache_dir=cache_dir)
        return _two_columns(dataset, video_column, label_column, label_names)
    if not os.path.exists(source) and not glob.glob(source):
        raise ValueError(f"{source}: no such file or folder; give the path of a dataset of layout {layout}")
    if layout == "list":
        rows, names = video_lists.read_list(source, video_column, label_column)
    elif layout == "ssv2":
        rows, names = video_lists.read_ssv2(source, label_names)
    else:
        rows, names = getattr(video_lists, f"read_{layout}")(source, split)
    beside = source if os.path.isdir(source) else os.path.dirname(source)
    paths = video_lists.locate(rows, video_root or beside)
    labels, names = video_lists.number_labels([label for _, label in rows], label_names or names)
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=names)})
    dataset = datasets.Dataset.from_dict({"video": paths, "label": labels}, features=features)
    # Many shards, so that processes and workers can share them out.
    return dataset.to_iterable_dataset(num_shards=min(len(dataset), 1024)) if streaming else dataset


def _load_shards(source, streaming, cache_dir):
    """WebDataset tars; they have no splits of their own."""
    source = os.path.join(glob.escape(source), "*.tar") if os.path.isdir(source) else source
    files = sorted(name for pattern in _expand_braces(source) for name in glob.glob(pattern) or [pattern])
    missing = [name for name in files if "://" not in name and not os.path.isfile(name)]
    if missing:
        raise ValueError(f"{source}: no tar shard {missing[0]}; give a file, pattern or folder of shards")
    files = [name if "://" in name else glob.escape(name) for name in files]  # datasets takes them for patterns
    load = functools.partial(datasets.load_dataset, "webdataset", data_files=files, split="train", cache_dir=cache_dir)
    # datasets takes only some extensions for video (webm is not one): look first, then say which columns are.
    try:
        columns = load(streaming=True).features
    except tarfile.ReadError as error:
        raise ValueError(f"{source}: the first shard is no tar file: {error}; replace it or leave it out") from error
    features = {name: Video(decode=False) if _is_video(name) else columns[name] for name in columns}
    return load(streaming=streaming, features=Features(features))


def _is_video(column):
    return column.rpartition(".")[2].lower() in video_lists.VIDEO_EXTENSIONS


def _expand_braces(pattern):
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [p for i in numbers for p in _expand_braces(pattern[: match.start()] + i + pattern[match.end() :])]


def _two_columns(dataset, video_column, label_column, label_names):
    """The columns video and label of what load_dataset gave; labels are ints, names, or a json's field."""
    columns = dataset.column_names
    candidates = [video_column, *filter(_is_video, columns)]
    video = next((name for name in candidates if name in columns), None)
    label = next((name for name in (label_column, "cls", "json", "txt") if name in columns), None)
    if video is None or label is None:
        raise ValueError(
            f"wanted a video column {video_column!r} and a label column {label_column!r}, got {columns}; "
            "name them with video_column= and label_column="
        )
    old_names = getattr(dataset.features[label], "names", None)
    plain = functools.partial(_plain_label, field=label_column, old_names=old_names)
    names = label_names or old_names
    dataset = dataset.cast_column(video, Video(decode=False))
    if isinstance(dataset, datasets.Dataset):
        if "__url__" in columns and pc.struct_field(dataset.with_format("arrow")[video][:], "bytes").null_count:
            raise _hidden_by_a_file("one of its videos")
        labels, names = video_lists.number_labels([plain(value) for value in dataset[label][:]], names)
        dataset = dataset.select_columns(video).rename_column(video, "video")
        # A column in memory beside the files on disk: no second copy of the videos.
        return dataset.add_column("label", labels, feature=ClassLabel(names=names))
    label_feature = Value("int64") if names is None else ClassLabel(names=names)
    row = functools.partial(_stream_row, video=video, label=label, plain=plain, names=names)
    features = Features({"video": Video(decode=False), "label": label_feature})
    return dataset.map(row, features=features, remove_columns=columns)


def _plain_label(value, field, old_names):
    if isinstance(value, dict):
        value = value[field]
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        return int(value) if re.fullmatch(video_lists.INDEX, value.strip()) else value.strip()
    return value if old_names is None else old_names[value]


def _stream_row(row, video, label, plain, names):
    value = plain(row[label])
    if names is None and not isinstance(value, int):
        raise ValueError(f"label {value!r} is a name and a stream cannot list its classes; give label_names=")
    if names is not None:
        value = video_lists.number_labels([value], names)[0][0]
    clip = row[video]
    if row.get("__url__") and clip["bytes"] is None:
        raise _hidden_by_a_file(clip["path"])
    if row.get("__url__") and clip["path"]:  # keys are unique within a shard only
        clip = {"path": f"{os.path.basename(row['__url__'])}/{clip['path']}", "bytes": clip["bytes"]}
    return {"video": clip, "label": value}


def _hidden_by_a_file(name):
    # datasets drops the bytes of a video if there is a file of its name: the model would be shown that file.
    return ValueError(
        f"the working directory {os.getcwd()} has a file with the name of a video of the shards ({name}), which "
        "datasets takes for that video; start from another directory"
    )


def label_names_of(dataset):
    """The class names, by index; ValueError if the dataset was loaded without any."""
    feature = dataset.features["label"]
    if not isinstance(feature, ClassLabel):
        raise ValueError("the labels of this dataset have no names; load it with label_names=")
    return list(feature.names)


def align_labels(dataset, label_names):
    """The dataset with labels numbered as in `label_names` (a model's classes), matched by name.

    A dataset whose names are its own numbers ("0", "1", ...: a list with integer labels) is taken to be
    numbered as the model is. Raises ValueError naming the classes that the model does not have.
    """
    old, names = label_names_of(dataset), list(label_names)
    if old == [str(i) for i in range(len(old))] and len(old) <= len(names):
        index = list(range(len(old)))
    else:
        unknown = [name for name in old if name not in names]
        if unknown:
            raise ValueError(
                f"{len(unknown)} classes of the data are unknown to the model: {unknown[:10]}; it has "
                f"{len(names)}: {names[:3]}...; rename or leave out these classes, or use another model"
            )
        index = [names.index(name) for name in old]
    if old == names:
        return dataset
    feature = ClassLabel(names=names)
    if isinstance(dataset, datasets.Dataset):
        labels = [index[label] for label in dataset["label"][:]]
        return dataset.remove_columns("label").add_column("label", labels, feature=feature)
    features = Features({**dataset.features, "label": feature})
    return dataset.map(functools.partial(_renumber, index=index), features=features)


def _renumber(row, index):
    return {"label": index[row["label"]]}
