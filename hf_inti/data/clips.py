"""The clips that a model is trained and tested on: decoding, seeding and batching of a dataset's videos.

`VideoClips` and `StreamingVideoClips` decode and augment with the caller's `transform(video, generator) ->
dict of tensors`; `video` is the row's dict or, for a dataset from `cache_frames`, all frames as uint8 (T, 3, h, w).
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator

import datasets
import pyarrow.compute as pc
import torch
from datasets import Features, Value
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher
from datasets.utils.file_utils import xopen
from torch.utils.data import get_worker_info

from ..model.video_decoding import VideoDecodingError


logger = logging.getLogger(__name__)

MAX_DRAWS = 100  # this many broken videos in a row is a systematic problem
BAD_VIDEO_MODES = ("skip", "error", "keep")


def stable_hash(text: str) -> int:
    """A hash of 63 bits, the same in every process and run (unlike Python's own)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class _Clips:
    """What map-style and streamed clips share: seeding and the decoding of one row."""

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        transform: Callable[..., dict],
        seed: int,
        repeats: int,
        with_label: bool,
    ):
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        self.dataset, self.transform = dataset, transform
        self.seed, self.repeats, self.with_label = seed, repeats, with_label
        # In shared memory: persistent workers hold a copy of this object, which set_epoch would not reach.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Call before each epoch: augmentation depends only on (seed, epoch, item, repeat)."""
        self._epoch.fill_(epoch)

    def _generators(self, item: int) -> list[torch.Generator]:
        keys = [repr((self.seed, self._epoch.item(), item, repeat)) for repeat in range(self.repeats)]
        return [torch.Generator().manual_seed(stable_hash(key)) for key in keys]

    def _tensors(self, row: dict, generators: list[torch.Generator]) -> tuple[dict, int | torch.Tensor]:
        """Tensors of a row's clips and its labels, with a leading dimension if there are repeats."""
        extra = (row["label"],) if self.with_label else ()
        clips = [dict(self.transform(_read_video(row), generator, *extra)) for generator in generators]
        labels = [int(clip.pop("labels", row["label"])) for clip in clips]
        if self.repeats == 1:
            return clips[0], labels[0]
        return {key: torch.stack([clip[key] for clip in clips]) for key in clips[0]}, torch.tensor(labels)


def _item(tensors: dict, labels: int | torch.Tensor, index: int, row: dict, ok: bool, bad: dict[str, str]) -> dict:
    return {**tensors, "labels": labels, "index": index, "video_id": _name(row, index), "ok": ok, "bad": bad}


def _name(row: dict, index: int) -> str:
    path = row["path"] if "frames" in row else row["video"]["path"]
    return path or f"item {index}"


def _read_video(row: dict) -> dict | torch.Tensor:
    if "frames" in row:
        if row["error"]:
            raise VideoDecodingError(row["error"])
        return torch.frombuffer(bytearray(row["frames"]), dtype=torch.uint8).view(row["shape"])
    path, data = row["video"]["path"], row["video"]["bytes"]
    if data is None and "://" in path:  # streamed from the Hub, or inside an archive
        try:
            with xopen(path, "rb") as file:
                data = file.read()
        except Exception as error:  # what opens archives has errors of its own
            reason = " ".join(str(error).split())[:200]
            raise VideoDecodingError(f"{path}: {reason or type(error).__name__} (check that it is there)") from error
    return {"path": path, "bytes": data}


def _reason(row: dict, index: int, error: VideoDecodingError) -> str:
    """The reason why a video is broken, without the video's name."""
    return str(error).removeprefix(f"{_name(row, index)}: ").removeprefix("<bytes>: ")


def _all_broken(bad: dict[str, str], tries: int) -> VideoDecodingError:
    name, reason = next(iter(bad.items()))
    return VideoDecodingError(f"{name}: {reason}; {tries} videos in a row could not be decoded")


class VideoClips(_Clips, torch.utils.data.Dataset):
    """Decoded, augmented clips of a map-style dataset of `load_video_dataset` or `cache_frames`.

    An item holds the tensors of `transform(video, generator)`, `labels` (int), `index` (the row asked for), `video_id`
    (path of the video that the tensors show), `ok`, and `bad` (broken videos: name to reason). With `repeats=R > 1` the
    video is sampled R times: tensors get a leading R, `labels` is (R,). `with_label=True` calls
    `transform(video, generator, label)`, which may return a new scalar "labels", for flips that change the class.

    A broken video is one that raises VideoDecodingError; `on_bad_video` decides what happens then:
    - "skip": another video, drawn with the item's generator, replaces it, and `bad` names it (training);
    - "error": the error is raised;
    - "keep": the item has `ok=False` and the tensors of `transform.blank()`; count it as wrong (evaluation).

    Raises ValueError for options outside their range, and VideoDecodingError when MAX_DRAWS videos in a row are broken.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable[..., dict],
        *,
        seed: int = 0,
        repeats: int = 1,
        on_bad_video: str = "skip",
        with_label: bool = False,
    ):
        super().__init__(dataset, transform, seed, repeats, with_label)
        if on_bad_video not in BAD_VIDEO_MODES:
            raise ValueError(f"on_bad_video must be one of {', '.join(BAD_VIDEO_MODES)}, got {on_bad_video!r}.")
        self.on_bad_video = on_bad_video

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        generators, bad, row, tries = self._generators(index), {}, self.dataset[index], 0
        while True:
            try:
                tensors, labels = self._tensors(row, generators)
                return _item(tensors, labels, index, row, True, bad)
            except VideoDecodingError as error:
                if self.on_bad_video == "error":
                    raise
                bad.setdefault(_name(row, index), _reason(row, index, error))
                tries += 1
            if self.on_bad_video == "keep":
                return _item(self.transform.blank(), row["label"], index, row, False, bad)
            if tries == MAX_DRAWS:
                raise _all_broken(bad, tries)
            row = self.dataset[int(torch.randint(len(self), (), generator=generators[0]))]


class StreamingVideoClips(_Clips, torch.utils.data.IterableDataset):
    """VideoClips' items from a streamed dataset; broken videos are left out and named in the `bad` of another item.

    Process `rank` of `world_size` reads its own part, and each DataLoader worker its own part of that (workers beyond
    the number of shards are idle). Rows are shuffled within a buffer of `shuffle_buffer`, differently in each epoch.
    A stream has no row numbers: `index` is a hash of `video_id`, and with (seed, epoch, repeat) it seeds the
    augmentation, which therefore does not depend on workers or processes. Raises VideoDecodingError when MAX_DRAWS
    videos in a row are broken.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[..., dict],
        *,
        seed: int = 0,
        repeats: int = 1,
        with_label: bool = False,
        shuffle_buffer: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if shuffle_buffer:
            dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer)
        if world_size > 1:
            dataset = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
        super().__init__(dataset, transform, seed, repeats, with_label)
        self.world_size = world_size

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        bad, tries, waiting = {}, 0, None  # holds one item back, to report broken videos at the end
        for position, row in enumerate(self.dataset):
            name = _name(row, position)
            index = stable_hash(name)
            try:
                tensors, labels = self._tensors(row, self._generators(index))
            except VideoDecodingError as error:
                bad.setdefault(name, _reason(row, position, error))
                tries += 1
                if tries == MAX_DRAWS:
                    raise _all_broken(bad, tries) from None
                continue
            if waiting is not None:
                yield waiting
            waiting = {**_item(tensors, labels, index, row, True, bad), "video_id": name}
            bad, tries = {}, 0
        if waiting is not None:
            waiting["bad"] |= bad
            yield waiting
        elif bad and self.world_size == 1 and get_worker_info() is None:
            raise _all_broken(bad, tries)
        elif bad:  # a small share may have no other video
            logger.warning("all videos of one worker's share are broken: %s", "; ".join(bad))


def collate(items: list[dict]) -> dict:
    """A batch of VideoClips' items: tensors (B, ...), `labels`, `index` (B,) int64, `ok` (B,) bool, `video_ids` a list,
    `bad` name to reason. Each repeat is a clip of its own: B = items x repeats.
    """
    repeats = [item["labels"].numel() if torch.is_tensor(item["labels"]) else 1 for item in items]
    batch = {}
    for key in items[0].keys() - {"labels", "index", "video_id", "ok", "bad"}:
        clips = [item[key] if torch.is_tensor(item["labels"]) else item[key].unsqueeze(0) for item in items]
        batch[key] = torch.cat(clips)
    batch["labels"] = torch.cat([torch.as_tensor(item["labels"]).reshape(-1) for item in items])
    each = torch.tensor(repeats)
    batch["index"] = torch.tensor([item["index"] for item in items]).repeat_interleave(each)
    batch["ok"] = torch.tensor([item["ok"] for item in items]).repeat_interleave(each)
    batch["video_ids"] = [item["video_id"] for item, n in zip(items, repeats, strict=True) for _ in range(n)]
    batch["bad"] = {name: reason for item in items for name, reason in item["bad"].items()}
    return batch


class BadVideos:
    """The broken videos of a run, each counted once: `reasons`, name to reason."""

    def __init__(self):
        self.reasons: dict[str, str] = {}

    def add(self, bad: dict[str, str]) -> None:
        """Add a batch's `bad`; a video that is already known keeps its first reason."""
        self.reasons = {**bad, **self.reasons}

    def __len__(self) -> int:
        return len(self.reasons)

    def report(self) -> str:
        """Their number, then the first 20 by name with their reasons, one per line. A URL's query may be a secret."""
        shown = {name: name.partition("?")[0] if "://" in name else name for name in self.reasons}
        lines = [f"{shown[name]}: {reason}" for name, reason in sorted(self.reasons.items())]
        more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        return "\n".join([f"{len(lines)} broken videos", *lines[:20], *more])

    def to_json(self) -> str:
        """Their number and all names with reasons: {"count": n, "videos": {name: reason}}."""
        return json.dumps({"count": len(self), "videos": self.reasons}, indent=2, sort_keys=True)


def cache_frames(
    dataset: datasets.Dataset, decode: Callable[[dict], torch.Tensor], num_proc: int | None = None
) -> datasets.Dataset:
    """The dataset with all videos decoded once, into an Arrow file in datasets' cache: for small datasets.

    `decode(video) -> uint8 (T, 3, h, w)`; VideoClips then passes those frames to its transform. The cache is keyed by
    the dataset, `decode` (with its state) and the files' sizes and modification times: any change decodes everything
    again. Broken videos stay broken: their VideoDecodingError is raised on access. With several processes, let one run
    this first.
    """
    paths = pc.struct_field(dataset.with_format("arrow")["video"][:], "path").to_pylist()
    stats = [os.stat(path) if path and os.path.isfile(path) else None for path in paths]
    stamps = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
    fingerprint = Hasher.hash((dataset._fingerprint, decode, stamps))
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "hf_inti_frames")
    os.makedirs(folder, exist_ok=True)
    columns = {
        "path": Value("string"),
        "frames": Value("large_binary"),
        "shape": datasets.Sequence(Value("int32")),
        "error": Value("string"),
        "label": dataset.features["label"],
    }
    return dataset.map(
        functools.partial(_decode_row, decode=decode),
        remove_columns=["video"],
        features=Features(columns),
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=os.path.join(folder, f"{fingerprint}.arrow"),
        writer_batch_size=4,  # rows are megabytes
        desc="Decoding videos",
    )


def _decode_row(row: dict, decode: Callable[[dict], torch.Tensor]) -> dict:
    path = row["video"]["path"]
    try:
        frames = decode(_read_video(row)).contiguous()
    except VideoDecodingError as error:
        return {"path": path, "frames": b"", "shape": [0], "error": str(error), "label": row["label"]}
    data = frames.numpy().tobytes()
    return {"path": path, "frames": data, "shape": list(frames.shape), "error": "", "label": row["label"]}
