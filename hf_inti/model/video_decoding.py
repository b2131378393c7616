"""Reads exactly the frames asked for from a video file, with PyAV, in memory independent of its length.

What a frame is: the i-th picture that decoding the whole file from its start gives, turned upright, as RGB.
Two ways lead there, with the same pixels:
- *sequential*: decode from the start up to the last wanted frame. The definition, and always right.
- *planned*: a pass over the packets without decoding them lists the timestamps; then, for each wanted frame,
  decode from the last key frame before it up to it. Used where the packets of the container are known to tell
  the frames; whatever does not go as planned is decoded sequentially instead.
Headers are never trusted: they overstate, understate or lack the number of frames.
"""

from __future__ import annotations

import io
import operator
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain, pairwise
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.utils.data import get_worker_info


# Where each packet is one frame and knows when it is shown. Not so elsewhere: VP8 has packets that show
# nothing, MPEG-TS and MPEG-PS cut packets anywhere, AVI knows no reordering.
_PLANNED_CONTAINERS = ("mov", "matroska", "avi")
_PLANNED_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
# Where a frame marked as no reference may be skipped because no frame at all refers to it. HEVC's mark holds
# only within one temporal layer; VP9 and AV1 predict motion and probabilities from any frame.
_SKIPPING_CODECS = ("h264", "mpeg4")
_SMALLEST_MPEG4_FRAME = 16  # bytes; a smaller packet is a placeholder that shows nothing
_SEEK_GAP = 48  # reading this many packets is cheaper than a seek
_MOST_DECODERS = 4  # at once, each with a few frames in memory
_INTRA = 1  # FFmpeg's AV_PICTURE_TYPE_I

Source = str | os.PathLike | bytes | BinaryIO


class VideoDecodingError(ValueError):
    """A video cannot be read. One line: which file, why, and what to do."""


class _PlanFailed(Exception):
    """The file is not what its packets promised: decode it sequentially."""


class VideoInfo(NamedTuple):
    """What [`probe_video`] finds. The fields are those of [`VideoReader`]."""

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    timestamps: list[float]


class VideoReader:
    """The frames of a video. Opening it counts them: it reads the file once and decodes no more than it must.

    Args:
        source: a path, the bytes of a file, or a binary file object. A file object is read from its start and
            left open, at no particular position; one that cannot seek is read into memory.

    Attributes:
        num_frames: how many frames there are. Corruption within a frame shows only when `read` decodes it.
        timestamps: when each frame is shown, in seconds, as the file counts them (the first need not be 0);
            multiples of the nominal frame duration if the file does not say, or not in order.
        fps: average over the whole video; the nominal rate if there is a single frame.
        duration: seconds, `num_frames / fps`.
        width, height: of the first frame, upright, in pixels.

    Raises:
        VideoDecodingError: if there is no such file or none of its frames can be decoded.
        ImportError: without PyAV.
    """

    def __init__(self, source: Source):
        self._av = _import_av()
        self._file, self._name, self._owned = _open_file(source)
        self._again = source if self._owned else None  # what gives the same file anew, to be read independently
        if type(self._file) is io.BytesIO:
            self._again = self._file.getvalue()  # no copy, if it was made of bytes
        try:
            self._scan()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc_info) -> None:
        if self._owned:
            self._file.close()

    def read(self, indices: Iterable[int], transform: Callable[[torch.Tensor], Any] | None = None) -> list:
        """Decodes the frames `indices`.

        Args:
            indices: from 0 to `num_frames - 1`, in any order. Repeats share one result.
            transform: applied to each frame as soon as it is decoded, so that only its results are kept. Parts of
                the video that do not depend on each other are decoded side by side, with at most as many threads as
                torch uses: it may be called by several of them at once, and with the frames in any order.

        Returns:
            For each index the frame, (H, W, 3) uint8 RGB, or what `transform` made of it, in the order asked.
            In a video that changes its size so do H and W.

        Raises:
            ValueError: if an index is not a whole number or out of range.
            VideoDecodingError: if a frame cannot be decoded.
        """
        indices = [self._check_index(index) for index in indices]
        if not indices:
            return []
        wanted = set(indices)

        def convert(frames: Iterator[tuple[int | None, Any]]) -> tuple[dict[int, Any], int]:
            """The results of those of the frames that are wanted, and how many frames there were."""
            results, num_decoded = {}, 0
            reformatter = self._av.video.reformatter.VideoReformatter()  # one for all: it takes time to set up
            with closing(frames):  # which closes the container too
                for index, frame in frames:
                    num_decoded += 1
                    if index in wanted:
                        rgb = _to_rgb(frame, reformatter)
                        results[index] = rgb if transform is None else transform(rgb)
            return results, num_decoded

        try:
            results = self._read_planned(wanted, convert)
            if len(results) == len(wanted):
                return [results[index] for index in indices]
        except _PlanFailed:
            pass
        results, num_decoded = convert(self._sequential(last=max(wanted)))
        if len(results) == len(wanted):
            return [results[index] for index in indices]
        missing = min(wanted - results.keys())
        raise self._error(f"frame {missing} of {self.num_frames} is corrupt or cut off, {num_decoded} decode")

    def _check_index(self, index: int) -> int:
        try:
            value = operator.index(index)
        except TypeError:
            raise ValueError(f"A frame index must be a whole number, got {index!r}; convert it.") from None
        if not 0 <= value < self.num_frames:
            raise ValueError(
                f"Frame index {value} is out of range: {self._name} has {self.num_frames} frames; "
                f"choose from 0 to {self.num_frames - 1}."
            )
        return value

    def _scan(self) -> None:
        """Sets the attributes, and what `_planned` needs."""
        self._index_of = None  # from a frame's pts to its index; None: only sequential decoding will do
        self._pts = []  # of every packet, in the order of decoding
        self._keys = []  # of every key frame: (position in _pts, pts, where to seek to)
        shown, smallest, first, sound = [], _SMALLEST_MPEG4_FRAME, None, True
        with self._container(self._file) as (container, stream):
            stream.codec_context.thread_type = "NONE"  # FFmpeg's threads take longer to start than one frame to decode
            try:
                for packet in _packets(container, stream):
                    sound = sound and packet.pts is not None and not packet.is_corrupt
                    if sound and packet.is_keyframe:
                        seek_to = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
                        self._keys.append((len(self._pts), packet.pts, seek_to))
                    if sound and not packet.is_discard:  # discarded: cut away by the container's edit list
                        shown.append((packet.pts, len(self._pts)))
                    self._pts.append(packet.pts)
                    smallest = min(smallest, packet.size)
                    if first is None:
                        first = next(iter(_decode(stream, packet)), None)
            except Exception:  # whatever the file provokes: sequential decoding finds how far it can be read
                sound = False
            time_base = stream.time_base
            rate = float(stream.average_rate or stream.guessed_rate or 1)
            family = container.format.name.split(",")[0]
            codec = stream.codec_context.codec.canonical_name
            reordered = stream.codec_context.has_b_frames

        self._skipping = codec in _SKIPPING_CODECS
        shown.sort()
        if (
            sound
            and first is not None
            and family in _PLANNED_CONTAINERS
            and codec in _PLANNED_CODECS
            and not (family == "avi" and reordered)
            and not (codec == "mpeg4" and smallest < _SMALLEST_MPEG4_FRAME)
            and len({pts for pts, _ in shown}) == len(shown)
            # frames decoded or shown before the first key frame may not be decodable
            and self._keys
            and self._keys[0][0] == 0
            and self._keys[0][1] <= shown[0][0]
        ):
            self._positions = [position for _, position in shown]
            self._index_of = {pts: index for index, (pts, _) in enumerate(shown)}
            pts = list(self._index_of)
        else:
            first, pts = None, []
            with closing(self._sequential()) as frames:
                for _, frame in frames:
                    first = first or frame
                    pts.append(frame.pts)
            if first is None:
                raise self._error("no frame can be decoded: truncated or corrupt")

        self.num_frames = len(pts)
        if None in pts or any(later <= earlier for earlier, later in pairwise(pts)):
            self.timestamps = [index / rate for index in range(self.num_frames)]
        else:
            self.timestamps = [value * time_base.numerator / time_base.denominator for value in pts]
        if self.num_frames > 1:
            rate = (self.num_frames - 1) / (self.timestamps[-1] - self.timestamps[0])
        self.fps = rate
        self.duration = self.num_frames / rate
        size = (first.width, first.height)
        self.width, self.height = size[::-1] if _quarter_turns(first) % 2 else size

    def _sequential(self, last: int | None = None) -> Iterator[tuple[int | None, Any]]:
        """Yields (index, frame) from the start of the video to frame `last`, its end or the first failure."""
        with self._container(self._file) as (container, stream):
            count = 0
            try:
                for packet in chain(_packets(container, stream), [None]):
                    for frame in _decode(stream, packet):
                        index = count if self._index_of is None else self._index_of.get(frame.pts)
                        yield index, frame
                        if index == last:
                            return
                        count += 1
            except Exception:  # whatever the file provokes: the frames up to here are good
                return

    def _read_planned(self, wanted: set[int], convert: Callable) -> dict[int, Any]:
        """The results of `convert` for the wanted frames. Raises _PlanFailed."""
        if self._index_of is None:
            raise _PlanFailed()
        targets = {self._positions[index] for index in wanted}
        todo = self._runs(wanted)
        decoders = min(len(todo), torch.get_num_threads(), _MOST_DECODERS)
        if self._again is None or get_worker_info() is not None:  # the other workers keep the other cores busy
            decoders = 1
        runs = iter(todo)  # shared: whoever is free takes the next
        with ThreadPoolExecutor(max(1, decoders - 1)) as pool:  # starts no thread before there is work
            others = [pool.submit(self._planned_beside, runs, targets, convert) for _ in range(decoders - 1)]
            try:
                results, _ = convert(self._planned(self._file, runs, targets))
            finally:
                for _ in runs:  # after a failure nobody goes on
                    pass
            for other in others:
                results |= other.result()
        return results

    def _planned_beside(self, runs: Iterator, targets: set[int], convert: Callable) -> dict[int, Any]:
        with closing(_open_file(self._again)[0]) as file:
            return convert(self._planned(file, runs, targets))[0]

    def _planned(self, file: BinaryIO, runs: Iterator, targets: set[int]) -> Iterator[tuple[int | None, Any]]:
        """Yields (index, frame) of the targets in `runs` and others, right if it does not raise _PlanFailed."""
        with self._container(file) as (container, stream):
            # FFmpeg's own threads hide errors: with those for slices no frame is marked as corrupt, with those for
            # frames not every one that is.
            stream.codec_context.thread_type = "NONE"
            try:
                packets, reached = _packets(container, stream), 0
                for start, stop, seek_to in runs:
                    if start - reached > _SEEK_GAP:
                        container.seek(seek_to, stream=stream)
                        packets = _packets(container, stream)
                        # a seek that ends early is mended here; after one that ends late, nothing is found
                        packets = chain([next(p for p in packets if p.pts == self._pts[start])], packets)
                    else:
                        for _ in range(start - reached):
                            next(packets)
                    checked = start == 0
                    for position in range(start, stop + 1):
                        packet = next(packets) if position < stop else None  # None drains the decoder
                        if packet is not None:
                            if packet.pts != self._pts[position]:
                                raise _PlanFailed()
                            skip = self._skipping and position > start and position not in targets
                            stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
                        for frame in _decode(stream, packet):
                            if frame.pts < self._pts[start]:
                                continue  # refers to frames before the key frame, which are not there
                            # a "key frame" may be the start of a gradual refresh, which is no clean start
                            checked = checked or (frame.pts == self._pts[start] and frame.pict_type == _INTRA)
                            if frame.is_corrupt or not checked:
                                raise _PlanFailed()
                            yield self._index_of.get(frame.pts), frame
                    stream.codec_context.flush_buffers()
                    reached = stop
            except Exception as error:  # whatever the file provokes, or no more packets
                raise _PlanFailed from error

    def _runs(self, wanted: set[int]) -> list[tuple[int, int, int]]:
        """Stretches of packets to decode: (position of a key frame, stop before this, where to seek to)."""
        spans = []
        for index in wanted:
            position = self._positions[index]
            key = bisect_right(self._keys, position, key=operator.itemgetter(0)) - 1
            while self._keys[key][1] > self._pts[position]:  # decoded after this key frame, shown before it
                key -= 1
            spans.append((self._keys[key][0], position + 1, self._keys[key][2]))
        runs = []
        for start, stop, seek_to in sorted(spans):
            if runs and start < runs[-1][1]:
                start, previous_stop, seek_to = runs.pop()
                stop = max(stop, previous_stop)
            runs.append((start, stop, seek_to))
        return runs

    @contextmanager
    def _container(self, file: BinaryIO) -> Iterator[tuple[Any, Any]]:
        """The file and its first video stream, opened anew: a pass inherits no state from the one before."""
        try:
            file.seek(0)
            # No protocol but the file in hand: a playlist would let a video read other files, and the network.
            options = {"protocol_whitelist": ""}
            container = self._av.open(file, mode="r", metadata_errors="ignore", options=options)
        except Exception as error:
            raise self._error(f"not a video that can be opened: {_one_line(error)}") from error
        with container:
            cover = self._av.stream.Disposition.attached_pic  # as of an album
            videos = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
            if not videos:
                raise self._error(f"no video that can be decoded among {len(container.streams)} stream(s)")
            if get_worker_info() is not None:  # the other workers keep the other cores busy
                videos[0].codec_context.thread_type = "NONE"
                videos[0].codec_context.thread_count = 1  # some decoders' own threads heed only this
            yield container, videos[0]

    def _error(self, reason: str, advice: str = "replace the file or leave it out") -> VideoDecodingError:
        return VideoDecodingError(f"{self._name}: {reason} ({advice})")


def decode_frames(source: Source, indices: Iterable[int]) -> torch.Tensor:
    """The frames `indices` of a video, (len(indices), H, W, 3) uint8 RGB; see [`VideoReader.read`].

    Raises:
        VideoDecodingError: also if the frames differ in size.
    """
    with VideoReader(source) as reader:
        frames = reader.read(indices)
        sizes = sorted({tuple(frame.shape[:2]) for frame in frames})
        if len(sizes) > 1:
            raise reader._error(f"frames of sizes {sizes}", "give VideoReader.read a resizing transform")
        if not frames:
            return torch.empty(0, reader.height, reader.width, 3, dtype=torch.uint8)
        return torch.stack(frames)


def probe_video(source: Source) -> VideoInfo:
    """Number of frames, frame rate, duration, size and timestamps of a video; see [`VideoReader`]."""
    with VideoReader(source) as reader:
        return VideoInfo(*(getattr(reader, field) for field in VideoInfo._fields))


def _import_av():
    """PyAV, first imported when a video is decoded: clips may also arrive as tensors, and then it need not be there."""
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise ImportError("Decoding video needs PyAV, which is not installed; run `pip install av`.") from error
    return av


def _open_file(source: Source) -> tuple[BinaryIO, str, bool]:
    """Returns a binary file that can seek, its name for errors, and whether it is ours to close."""
    is_path = isinstance(source, str | os.PathLike)
    is_bytes = isinstance(source, bytes | bytearray | memoryview)
    if is_path:
        name = os.fsdecode(source)
    elif is_bytes:
        name = "<bytes>"
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "<file object>"))
    else:
        raise ValueError(f"A video must be given as path, bytes or binary file, got {type(source).__name__}.")
    file = None
    try:
        if is_bytes:
            file = io.BytesIO(source)
        elif is_path:
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would wait for ever
                raise OSError("a directory or device")
            file = open(source, "rb")
        else:
            seekable = source.seekable() if hasattr(source, "seekable") else hasattr(source, "seek")
            file = source if seekable else io.BytesIO(source.read())
        file.seek(0)
        if not file.read(1):
            raise ValueError("empty file")
        if isinstance(file, io.TextIOBase):
            raise ValueError("opened as text")
    except Exception as error:  # a file object may raise anything
        if file is not source and file is not None:
            file.close()
        raise VideoDecodingError(f"{name}: {_one_line(error)} (give a readable binary file)") from error
    return file, name, file is not source


def _packets(container, stream) -> Iterator:
    """The packets of a stream that are not empty; an empty one would tell the decoder that the video ends."""
    return (packet for packet in container.demux(stream) if packet.size)


def _decode(stream, packet) -> list:
    """Sends one packet (None: the end) to the decoder and returns the frames that come out of it."""
    return stream.decode(packet)


def _to_rgb(frame, reformatter) -> torch.Tensor:
    """The frame upright, (H, W, 3) uint8."""
    rgb = torch.from_numpy(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
    turns = _quarter_turns(frame)
    return torch.rot90(rgb, turns).contiguous() if turns else rgb  # it copies even where there is nothing to turn


def _quarter_turns(frame) -> int:
    """How often to turn the frame by 90 degrees counterclockwise for it to stand upright."""
    return round(frame.rotation / 90) % 4


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
