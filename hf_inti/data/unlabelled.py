"""Videos without classes: files, folders, URLs, lists and tar shards. Nothing here opens a video."""

import glob
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .layouts import (
    PATH_COLUMNS,
    VIDEO_EXTENSIONS,
    expand_braces,
    is_inside,
    printable,
    read_csv,
    read_json,
    read_lines,
)


LISTS = (".txt", ".csv", ".json", ".jsonl", ".parquet")
READERS = 16  # shards whose headers are read at once: on network drives that is waiting


class Clip(NamedTuple):
    """Where a video is: `path` is a file or an http(s) URL; in a tar shard it has `size` bytes from `offset` on."""

    video: str  # its id: the absolute path, the URL, or the shard's absolute path, "/" and the member's name
    path: str
    offset: int = 0
    size: int = -1  # -1: all of the file
    error: str | None = None  # why it cannot be read, where that is known already


def find_videos(places: Iterable[str]) -> list[str]:
    """Files and URLs as they are, folders searched. Raises ValueError for a folder without videos."""
    found = []
    for place in places:
        if not Path(place).is_dir():
            found.append(place)
            continue
        inside = _search(place)
        if not inside:
            raise ValueError(f"{place} holds no videos; looked for files ending in {', '.join(VIDEO_EXTENSIONS)}.")
        found += inside
    return found


def find_clips(
    places: Iterable[str], video_column: str = "video", video_root: str | None = None, allow_outside_root: bool = False
) -> list[Clip]:
    """The clips of all places, each id once, in their order.

    A place is a video, a URL, a folder of videos or tar shards, tar shards ("x-*.tar", "x-{000..015}.tar"), or a
    list: a text file with a path or URL on each line, or csv, json, jsonl or Parquet with `video_column`. Listed paths
    are relative to `video_root` (default: the list's folder) and must stay in it without `allow_outside_root`. Missing
    files keep their rows: decoding reports them. Raises ValueError for a place or a list that holds no clips.
    """
    clips, shards = {}, []
    for place in places:
        if "://" in place:
            found = [_listed(place, "")]
        elif place.endswith(".tar"):
            found, shards = [], shards + _match(place)
        elif os.path.isdir(place):
            tars = sorted(glob.glob(os.path.join(glob.escape(place), "*.tar")))
            shards += tars
            found = [_listed(path, "") for path in (_search(place) if tars else find_videos([place]))]
        elif place.lower().endswith(LISTS):
            found = read_clips(place, video_column, video_root, allow_outside_root)
        else:
            found = [_listed(place, "")]
        clips |= {clip.video: clip for clip in found if clip.video not in clips}
    with ThreadPoolExecutor(READERS) as pool:
        for members in pool.map(lambda path: list(read_shard(path)), map(os.path.abspath, shards)):
            clips |= {clip.video: clip for clip in members if clip.video not in clips}
    if not clips:
        raise ValueError(f"there must be videos to read, got none in {', '.join(places)}; give others.")
    return list(clips.values())


def read_clips(source: str, video_column: str, video_root: str | None, allow_outside_root: bool) -> list[Clip]:
    """The clips of a list; see `find_clips`."""
    root = os.path.abspath(video_root or os.path.dirname(source))
    clips = []
    for number, name in enumerate(_column(source, video_column), 1):
        if not isinstance(name, str) or not name:
            got = f"{repr(name)[:100]} for video {number}"
            raise ValueError(f"{source} must give a path or URL for every video, got {got}; fix this row.")
        clip = _listed(name, root)
        if "://" not in name and not allow_outside_root and not is_inside(clip.path, root):
            raise ValueError(
                f"videos of {source} must be in video_root, {root}, got {name}; set video_root to a folder that holds "
                "them all, or allow_outside_root if you trust the list."
            )
        clips.append(clip)
    return clips


def read_shard(path: str) -> Iterator[Clip]:
    """The videos in a tar, found by its headers alone. Where it cannot be read further, the last clip says so."""
    if path != printable(path):
        yield _place(path)
        return
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Its size may be anything: tarfile reads a negative one for ever (CVE-2025-8194).
                if member.size < 0 or not member.offset < tar.offset <= size:
                    raise tarfile.ReadError(f"unexpected end of data in {member.name!r}")
                if member.isfile() and member.name.lower().rpartition(".")[2] in VIDEO_EXTENSIONS:
                    yield _member(path, member)
            _check_end(tar)
    except Exception as error:  # tarfile raises whatever it comes upon
        reason = " ".join((str(error) or repr(error)).split())
        yield Clip(path, path, error=f"not a tar that can be read to its end: {reason}")


def _member(path: str, member: tarfile.TarInfo) -> Clip:
    video = f"{path}/{printable(member.name)}"
    if member.issparse():
        return Clip(video, path, error="the shard must hold all its bytes, got a sparse file; pack it without --sparse")
    return Clip(video, path, member.offset_data, member.size)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless there is nothing but zeros: tarfile also ends, quietly, where a header is damaged."""
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * tarfile.RECORDSIZE)  # to see a hole in the tar, or another tar behind it
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise tarfile.ReadError(f"it must end in zeros, got others or nothing at byte {tar.offset}; pack it again")


def _listed(name: str, root: str) -> Clip:
    scheme, separator, _ = name.partition("://")
    if not separator:
        return _place(os.path.abspath(os.path.join(root, name)))
    if scheme.lower() not in ("http", "https"):
        raise ValueError(f"a URL must start with http:// or https://, got {name[:100]}; download or mount it first.")
    return _place(name)


def _place(path: str) -> Clip:
    """A file or URL, if Arrow has strings for its name, which goes to other machines."""
    shown = printable(path)
    error = None if shown == path else "its name must be UTF-8, got another encoding; rename it"
    return Clip(shown, shown, error=error)


def _column(source: str, video_column: str) -> list[str | None]:
    """The paths and URLs in a list."""
    kind = source.lower().rpartition(".")[2]
    if kind == "txt":
        return read_lines(source)
    if kind == "parquet":
        return _parquet_column(source, video_column)
    rows = read_csv(source) if kind == "csv" else read_json(source)
    column = _choose_column(source, list(rows[0]), video_column)
    return [row.get(column) for row in rows]


def _parquet_column(source: str, video_column: str) -> list[str | None]:
    try:
        column = _choose_column(source, pq.read_schema(source).names, video_column)
        return pq.read_table(source, columns=[column])[column].to_pylist()
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{source} must be a Parquet file with one column of each name, got: {reason}; write it again."
        raise ValueError(message) from None


def _choose_column(source: str, columns: list[str], video_column: str) -> str:
    column = next((name for name in (video_column, "url", *PATH_COLUMNS) if name in columns), None)
    if column is None:
        raise ValueError(f"{source} must have a column {video_column!r}, got {columns}; name it with video_column.")
    return column


def _search(folder: str) -> list[str]:
    inside = Path(folder).rglob("*")
    return sorted(str(path) for path in inside if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS)


def _match(pattern: str) -> list[str]:
    """Shards by name, number range or pattern. Raises ValueError where one is missing."""
    found = []
    for part in expand_braces(pattern) or [pattern]:
        files = [part] if os.path.isfile(part) else sorted(glob.glob(part))
        if not files:
            raise ValueError(f"{pattern} must name tar shards, got no file {part}; correct the path.")
        found += files
    return found
