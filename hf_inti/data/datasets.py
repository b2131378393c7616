"""Labelled videos as Hugging Face datasets: rows {"video": {"path", "bytes"}, "label"}; nothing is decoded."""

import functools
import glob
import os
import re
import tarfile
from collections.abc import Callable, Sequence

import datasets
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, Video
from huggingface_hub.constants import HF_HUB_CACHE

from . import layouts


def load_video_dataset(
    source: str | os.PathLike,
    *,
    layout: str = "auto",
    split: str = "train",
    video_root: str | os.PathLike | None = None,
    label_names: Sequence[str] | None = None,
    streaming: bool = False,
    video_column: str = "video",
    label_column: str = "label",
    cache_dir: str | os.PathLike | None = None,
    allow_outside_root: bool = False,
) -> Dataset | IterableDataset:
    """A dataset with the columns `video` (Video(decode=False): path and bytes) and `label` (ClassLabel).

    - `source`: class folders (with or without train/val/test above them), a list file, a folder of UCF101's
      or HMDB51's lists, tar shards ("x-{000..015}.tar", "x-*.tar" or a folder), or a dataset that
      `datasets.load_dataset` accepts (a Hub id, a folder of parquet).
    - `layout`: one of `layouts.LAYOUTS`; "auto" detects it.
    - `split`: which split, if the source has any; a source without splits is read whole.
    - `video_root`: the folder of listed videos; by default the list's own.
    - `label_names`: the classes in order; by default the source's own, else the sorted names.
    - `streaming`: return an IterableDataset.
    - `video_column`, `label_column`: the columns of a list with a header, of shards or of a Hub dataset.
    - `cache_dir`: for the copies that `load_dataset` makes of shards and Hub data.
    - `allow_outside_root`: let lists name videos outside `video_root`, and a dataset's rows any place.

    Listed files that are missing keep their rows: decoding reports them. Shards streamed without names keep labels
    as plain int64. Raises ValueError if the layout is unclear, nothing is found, or a label is outside the
    classes, a listed video outside `video_root` or that of a dataset's row outside of it.
    """
    source = os.fspath(source)
    if os.path.exists(source):
        source = os.path.abspath(source)  # paths in rows must not be treated as relative to video_root
    if layout == "auto":
        layout = layouts.detect_layout(source)
    if layout not in layouts.LAYOUTS:
        raise ValueError(f"layout must be auto or one of {', '.join(layouts.LAYOUTS)}, got {layout!r}.")
    if layout == "webdataset":
        dataset = _load_shards(source, streaming, cache_dir)
        return _two_columns(dataset, video_column, label_column, label_names)
    if layout == "hub":
        dataset = datasets.load_dataset(source, split=split, streaming=streaming, cache_dir=cache_dir)
        dataset = _two_columns(dataset, video_column, label_column, label_names)
        return dataset if allow_outside_root else _check_rows(dataset, source, cache_dir)
    if not os.path.exists(source) and not glob.glob(source):
        raise ValueError(
            f"source must be the path of a dataset of layout {layout}, got {source}: no such file or folder; "
            "correct the path or choose another layout=."
        )
    if layout == "list":
        rows, names = layouts.read_list(source, video_column, label_column)
    elif layout == "ssv2":
        rows, names = layouts.read_ssv2(source, label_names)
    else:
        rows, names = getattr(layouts, f"read_{layout}")(source, split)
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    paths = layouts.locate(rows, video_root or folder, allow_outside_root or layout == "folder")
    labels, names = layouts.number_labels([label for _, label in rows], label_names or names)
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=names)})
    dataset = Dataset.from_dict({"video": paths, "label": labels}, features=features)
    # Many shards, to be divided among processes and workers.
    return dataset.to_iterable_dataset(num_shards=min(len(dataset), 1024)) if streaming else dataset


def _load_shards(source: str, streaming: bool, cache_dir: str | os.PathLike | None) -> Dataset | IterableDataset:
    """WebDataset tars; they have no splits of their own."""
    source = os.path.join(glob.escape(source), "*.tar") if os.path.isdir(source) else source
    files = sorted(name for pattern in layouts.expand_braces(source) for name in glob.glob(pattern) or [pattern])
    missing = [name for name in files if "://" not in name and not os.path.isfile(name)]
    if missing:
        raise ValueError(
            f"{source} must name existing tar shards, got {missing[0]}, which is not a file; "
            "give a file, pattern or folder of shards."
        )
    files = [name if "://" in name else glob.escape(name) for name in files]  # datasets expands patterns
    load = functools.partial(datasets.load_dataset, "webdataset", data_files=files, split="train", cache_dir=cache_dir)
    # datasets recognises only some video extensions (not webm), so read the columns first, then declare the videos.
    try:
        columns = load(streaming=True).features
    except tarfile.ReadError as error:
        raise ValueError(
            f"the first shard of {source} must be a tar file, got: {' '.join(str(error).split())}; "
            "replace it or leave it out."
        ) from error
    features = {name: Video(decode=False) if _is_video(name) else columns[name] for name in columns}
    return load(streaming=streaming, features=Features(features))


def _is_video(column: str) -> bool:
    return column.rpartition(".")[2].lower() in layouts.VIDEO_EXTENSIONS


def _two_columns(
    dataset: Dataset | IterableDataset, video_column: str, label_column: str, label_names: Sequence[str] | None
) -> Dataset | IterableDataset:
    """The columns video and label of a dataset from load_dataset, whose labels are ints, names or fields of a json."""
    columns = dataset.column_names
    candidates = [video_column, *filter(_is_video, columns)]
    video = next((name for name in candidates if name in columns), None)
    label = next((name for name in (label_column, "cls", "json", "txt") if name in columns), None)
    if video is None or label is None:
        raise ValueError(
            f"the dataset must have a video column {video_column!r} and a label column {label_column!r}, "
            f"got {columns}; name them with video_column= and label_column=."
        )
    old_names = getattr(dataset.features[label], "names", None)
    plain = functools.partial(_plain_label, field=label_column, old_names=old_names)
    names = label_names or old_names
    dataset = dataset.cast_column(video, Video(decode=False))
    if isinstance(dataset, Dataset):
        if "__url__" in columns and pc.struct_field(dataset.with_format("arrow")[video][:], "bytes").null_count:
            raise _hidden_by_a_file("one of its videos")
        labels, names = layouts.number_labels([plain(value) for value in dataset[label][:]], names)
        dataset = dataset.select_columns(video).rename_columns({video: "video"})
        # The column is in memory, alongside the files on disk: the videos are not copied.
        return dataset.add_column("label", labels, feature=ClassLabel(names=names))
    label_feature = Value("int64") if names is None else ClassLabel(names=names)
    row = functools.partial(_stream_row, video=video, label=label, plain=plain, names=names)
    features = Features({"video": Video(decode=False), "label": label_feature})
    return dataset.map(row, features=features, remove_columns=columns)


def _check_rows(
    dataset: Dataset | IterableDataset, source: str, cache_dir: str | os.PathLike | None
) -> Dataset | IterableDataset:
    """The dataset, or a ValueError where a row names a video by a path or URL outside of it.

    A dataset may come from somebody else, as a list may. Videos that the rows hold themselves are in none of these.
    """
    config = datasets.config
    folders = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE]
    folders += [] if cache_dir is None else [cache_dir]
    if os.path.exists(source):  # else it is on the Hub
        folders.append(source if os.path.isdir(source) else os.path.dirname(source))
    folders += map(os.path.realpath, list(folders))  # rows may name either
    if isinstance(dataset, IterableDataset):
        return dataset.map(functools.partial(_checked_row, folders=folders), features=dataset.features)
    videos = dataset.with_format("arrow")["video"][:]
    paths = videos.filter(pc.is_null(pc.struct_field(videos, "bytes")))
    for path in pc.struct_field(paths, "path").to_pylist():
        layouts.check_row(path or "", folders)
    return dataset


def _checked_row(row: dict, folders: list[str | os.PathLike]) -> dict:
    if row["video"]["bytes"] is None:
        layouts.check_row(row["video"]["path"] or "", folders)
    return row


def _plain_label(value: dict | bytes | str | int, field: str, old_names: Sequence[str] | None) -> int | str:
    if isinstance(value, dict):
        value = value[field]
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        return int(value) if re.fullmatch(layouts.INDEX, value.strip()) else value.strip()
    return value if old_names is None else old_names[value]


def _stream_row(
    row: dict, video: str, label: str, plain: Callable[..., int | str], names: Sequence[str] | None
) -> dict:
    value = plain(row[label])
    if names is None and not isinstance(value, int):
        raise ValueError(f"labels must be numbers in a stream without label_names, got {value!r}; give label_names=.")
    if names is not None:
        value = layouts.number_labels([value], names)[0][0]
    clip = row[video]
    if row.get("__url__") and clip["bytes"] is None:
        raise _hidden_by_a_file(clip["path"])
    if row.get("__url__") and clip["path"]:  # keys are unique only within a shard
        clip = {"path": f"{os.path.basename(row['__url__'])}/{clip['path']}", "bytes": clip["bytes"]}
    return {"video": clip, "label": value}


def _hidden_by_a_file(name: str) -> ValueError:
    # datasets drops the bytes of a video if a file has its name: the model would get that file instead.
    return ValueError(
        "the working directory must have no file with the name of a video in the shards, which datasets would read "
        f"instead, got {os.getcwd()} with {name}; start from another directory."
    )


def label_names_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The class names, by index. Raises ValueError if the dataset was loaded without any."""
    feature = dataset.features["label"]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"the labels of the dataset must have names, got {feature}; load it with label_names=.")
    return list(feature.names)


def align_labels(dataset: Dataset | IterableDataset, label_names: Sequence[str]) -> Dataset | IterableDataset:
    """The dataset with labels numbered as in `label_names` (a model's classes), matched by name.

    If the names are just numbers ("0", "1", ...: a list with integer labels), the dataset is assumed to be numbered
    as the model is. Raises ValueError naming the classes that the model does not have.
    """
    old, names = label_names_of(dataset), list(label_names)
    if old == [str(i) for i in range(len(old))] and len(old) <= len(names):
        index = list(range(len(old)))
    else:
        unknown = [name for name in old if name not in names]
        if unknown:
            raise ValueError(
                f"the data's classes must be among the model's {len(names)}, {names[:3]}..., got {len(unknown)} "
                f"unknown to the model: {unknown[:10]}; rename or leave out these classes, or use another model."
            )
        index = [names.index(name) for name in old]
    if old == names:
        return dataset
    feature = ClassLabel(names=names)
    if isinstance(dataset, Dataset):
        labels = [index[label] for label in dataset["label"][:]]
        return dataset.remove_columns("label").add_column("label", labels, feature=feature)
    features = Features({**dataset.features, "label": feature})
    return dataset.map(functools.partial(_renumber, index=index), features=features)


def _renumber(row: dict, index: list[int]) -> dict:
    return {"label": index[row["label"]]}
