"""Decodes selected frames of a video file with PyAV; memory does not grow with the length of the video.

Frame i is the i-th picture obtained by decoding the whole file from its start, rotated upright, as RGB. There are two
ways to decode it, which give the same pixels:
- *sequential*: decode from the start to the last frame needed. This defines the result and always works.
- *planned*: list the timestamps by reading the packets without decoding them; then, for each frame needed, decode from
  the key frame before it. Only for containers and codecs whose packets describe the frames reliably; if the file turns
  out otherwise, it is decoded sequentially.
The frame count in the header is never used: it may be too high, too low or missing.
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


# Each packet holds one frame and its presentation time. Not so in others: VP8 has packets that show no frame, MPEG-TS
# and MPEG-PS split packets anywhere. AVI cannot hold the times of reordered frames, so those files are excluded.
_PLANNED_CONTAINERS = ("mov", "matroska", "avi")
_PLANNED_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
# Frames marked as non-reference may be skipped: no other frame depends on them. HEVC's mark holds only within one
# temporal layer; VP9 and AV1 predict motion and probabilities from any frame.
_SKIPPING_CODECS = ("h264", "mpeg4")
_MIN_MPEG4_FRAME = 16  # bytes; a smaller packet is a placeholder that shows no frame
_SEEK_GAP = 48  # packets; reading this many is cheaper than seeking
_MAX_DECODERS = 4  # at once; each holds a few frames in memory
_INTRA = 1  # FFmpeg's AV_PICTURE_TYPE_I

# FFmpeg would also read pictures, subtitles and plain text as videos, with code that is little tested.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,mjpeg,ivf,obu,nut,mxf,yuv4mpegpipe"
MAX_PIXELS = 16384 * 8192  # of a frame, four times 8K: a few bytes of a broken or hostile file may announce any size

Source = str | os.PathLike | bytes | BinaryIO


class VideoDecodingError(ValueError):
    """A video cannot be read. The message is one line: the file, the reason, and what to do."""


class _PlanFailed(Exception):
    """The file does not match its packets; decode it sequentially."""


class VideoInfo(NamedTuple):
    """The result of [`probe_video`]; the fields are those of [`VideoReader`]."""

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    timestamps: list[float]


class _Scan(NamedTuple):
    """What one pass over the packets finds."""

    shown: list[tuple[int, int]]  # (pts, position among the packets) of the frames, in the order of their display
    smallest: int  # bytes of the smallest packet, at most _MIN_MPEG4_FRAME
    first: Any  # the first decoded frame, or None
    sound: bool  # no packet is corrupt or without a pts
    family: str  # of the container
    codec: str
    reordered: bool  # some frames are decoded before frames that are shown earlier
    rate: float  # nominal frames per second
    time_base: Any  # seconds per unit of pts, a fraction


class VideoReader:
    """The frames of a video. Opening one reads the file once to count the frames, and decodes as few as possible.

    Args:
        source: a path, the bytes of a file, or a binary file object. A file object is read from its start and left
            open at an unspecified position; one that cannot seek is read into memory.

    Attributes:
        num_frames: the number of frames. Corruption within a frame is only found when `read` decodes it.
        timestamps: presentation times in seconds, as in the file (the first need not be 0); multiples of the nominal
            frame duration if the file has none or they do not increase.
        fps: average over the whole video; the nominal rate if there is a single frame.
        duration: seconds, `num_frames / fps`.
        width, height: of the first frame, upright, in pixels.

    Raises:
        VideoDecodingError: if the file does not exist, none of its frames can be decoded, or the first is larger than
            `MAX_PIXELS`.
        ImportError: if PyAV is not installed.
    """

    def __init__(self, source: Source):
        self._av = _import_av()
        self._file, self._name, self._owned = _open_file(source)
        self._reopenable = source if self._owned else None  # opens the same file a second time, for another thread
        if type(self._file) is io.BytesIO:
            self._reopenable = self._file.getvalue()  # no copy if it was made from bytes
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
            indices: from 0 to `num_frames - 1`, in any order. Repeated indices share one result.
            transform: applied to each frame as soon as it is decoded, so that only its results are kept in memory.
                Independent parts of the video are decoded in parallel, by at most as many threads as torch uses, so
                `transform` must be thread-safe and gets the frames in any order.

        Returns:
            For each index, in the order given, the frame, (H, W, 3) uint8 RGB, or the result of `transform`. H and W
            vary if the size changes within the video.

        Raises:
            ValueError: if an index is not an integer or out of range.
            VideoDecodingError: if a frame cannot be decoded.
        """
        indices = [self._check_index(index) for index in indices]
        if not indices:
            return []
        wanted = set(indices)

        def convert(frames: Iterator[tuple[int | None, Any]]) -> tuple[dict[int, Any], int]:
            """The results for the wanted frames, by index, and the number of frames decoded."""
            results, num_decoded = {}, 0
            reformatter = self._av.video.reformatter.VideoReformatter()  # reused: setting it up is slow
            with closing(frames):  # also closes the container
                for index, frame in frames:
                    num_decoded += 1
                    if index in wanted:
                        rgb = self._to_rgb(frame, reformatter)
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
            raise ValueError(f"a frame index must be an integer, got {index!r}.") from None
        if not 0 <= value < self.num_frames:
            raise ValueError(
                f"a frame index of {self._name} must be from 0 to {self.num_frames - 1} ({self.num_frames} frames), "
                f"got {value}."
            )
        return value

    def _scan(self) -> None:
        """Sets the public attributes and the state that planned decoding needs."""
        scan = self._read_packets()
        self._skipping = scan.codec in _SKIPPING_CODECS
        self._index_of = None  # from a frame's pts to its index; None: only sequential decoding is possible
        if self._can_plan(scan):
            self._positions = [position for _, position in scan.shown]
            self._index_of = {pts: index for index, (pts, _) in enumerate(scan.shown)}
            first, pts = scan.first, list(self._index_of)
        else:
            first, pts = None, []
            with closing(self._sequential()) as frames:
                for _, frame in frames:
                    first = first or frame
                    pts.append(frame.pts)
            if first is None:
                raise self._error("no frame can be decoded: truncated or corrupt")

        rate, time_base = scan.rate, scan.time_base
        self.num_frames = len(pts)
        seconds = [] if None in pts else [value * time_base.numerator / time_base.denominator for value in pts]
        # Of a clock that is far from 0, floats cannot tell neighbours apart.
        if not seconds or any(later <= earlier for earlier, later in pairwise(seconds)):
            seconds = [index / rate for index in range(self.num_frames)]
        self.timestamps = seconds
        if self.num_frames > 1:
            rate = (self.num_frames - 1) / (self.timestamps[-1] - self.timestamps[0])
        self.fps = rate
        self.duration = self.num_frames / rate
        size = (first.width, first.height)
        self.width, self.height = size[::-1] if _quarter_turns(first) % 2 else size

    def _read_packets(self) -> _Scan:
        """Reads all packets and decodes the first frame; sets `_pts` and `_keys`."""
        self._pts = []  # of every packet, in decoding order
        self._keys = []  # of every key frame: (position in _pts, pts, where to seek to)
        shown, smallest, first, sound = [], _MIN_MPEG4_FRAME, None, True
        with self._container(self._file) as (container, stream):
            codec = stream.codec_context
            codec.thread_type = "NONE"  # starting FFmpeg's threads takes longer than decoding one frame
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
            except Exception:  # a damaged file may raise anything; sequential decoding reads as far as possible
                sound = False
            rate = float(stream.average_rate or stream.guessed_rate or 1)
            family, name = container.format.name.split(",")[0], codec.codec.canonical_name
            return _Scan(
                sorted(shown), smallest, first, sound, family, name, codec.has_b_frames, rate, stream.time_base
            )

    def _can_plan(self, scan: _Scan) -> bool:
        """Whether the packets describe the frames reliably."""
        return bool(
            scan.sound
            and scan.first is not None
            and scan.family in _PLANNED_CONTAINERS
            and scan.codec in _PLANNED_CODECS
            and not (scan.family == "avi" and scan.reordered)
            and not (scan.codec == "mpeg4" and scan.smallest < _MIN_MPEG4_FRAME)
            and len({pts for pts, _ in scan.shown}) == len(scan.shown)
            # frames decoded or shown before the first key frame may not be decodable
            and self._keys
            and self._keys[0][0] == 0
            and self._keys[0][1] <= scan.shown[0][0]
        )

    def _sequential(self, last: int | None = None) -> Iterator[tuple[int | None, Any]]:
        """Yields (index, frame) from the start of the video up to frame `last`, the end or the first error."""
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
            except Exception:  # a damaged file may raise anything; the frames up to here are good
                return

    def _read_planned(self, wanted: set[int], convert: Callable) -> dict[int, Any]:
        """The results of `convert` for the wanted frames. Raises _PlanFailed."""
        if self._index_of is None:
            raise _PlanFailed()
        targets = {self._positions[index] for index in wanted}
        todo = self._runs(wanted)
        decoders = min(len(todo), torch.get_num_threads(), _MAX_DECODERS)
        if self._reopenable is None or get_worker_info() is not None:  # other workers use the other cores
            decoders = 1
        runs = iter(todo)  # shared by the threads: whichever is free takes the next run
        with ThreadPoolExecutor(max(1, decoders - 1)) as pool:  # starts threads only when there is work
            others = [pool.submit(self._read_runs, runs, targets, convert) for _ in range(decoders - 1)]
            try:
                results, _ = convert(self._planned(self._file, runs, targets))
            finally:
                for _ in runs:  # after an error, leave the other threads nothing to do
                    pass
            for other in others:
                results |= other.result()
        return results

    def _read_runs(self, runs: Iterator, targets: set[int], convert: Callable) -> dict[int, Any]:
        """What another thread does: decode from a file handle of its own."""
        with closing(_open_file(self._reopenable)[0]) as file:
            return convert(self._planned(file, runs, targets))[0]

    def _planned(self, file: BinaryIO, runs: Iterator, targets: set[int]) -> Iterator[tuple[int | None, Any]]:
        """Yields (index, frame) for the targets in `runs`, and other frames. Raises _PlanFailed."""
        with self._container(file) as (container, stream):
            # FFmpeg's threads hide errors: with slice threads no frame is marked as corrupt, with frame threads only
            # some of those that are.
            stream.codec_context.thread_type = "NONE"
            try:
                packets, reached = _packets(container, stream), 0
                for start, stop, seek_to in runs:
                    if start - reached > _SEEK_GAP:
                        container.seek(seek_to, stream=stream)
                        packets = _packets(container, stream)
                        # if the seek ended early, skip to the key frame; if it ended late, next() raises
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
                                continue  # depends on frames before the key frame, which were not decoded
                            # a "key frame" may only begin a gradual refresh, from which decoding cannot start
                            checked = checked or (frame.pts == self._pts[start] and frame.pict_type == _INTRA)
                            if frame.is_corrupt or not checked:
                                raise _PlanFailed()
                            yield self._index_of.get(frame.pts), frame
                    stream.codec_context.flush_buffers()
                    reached = stop
            except Exception as error:  # a damaged file may raise anything; StopIteration: packets are missing
                raise _PlanFailed from error

    def _runs(self, wanted: set[int]) -> list[tuple[int, int, int]]:
        """Runs of packets to decode: (position of the key frame, position of the end, where to seek to)."""
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
        """The container and its first video stream, freshly opened, so that no state is left from an earlier pass."""
        try:
            file.seek(0)
            # No other protocols: a playlist could otherwise read other files or the network.
            options = {"protocol_whitelist": "", "format_whitelist": CONTAINERS}
            container = self._av.open(file, mode="r", metadata_errors="ignore", options=options)
        except Exception as error:
            raise self._error(f"not a video that can be opened: {_one_line(error)}") from error
        with container:
            cover = self._av.stream.Disposition.attached_pic  # such as an album cover
            videos = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
            if not videos:
                raise self._error(f"no video that can be decoded among {len(container.streams)} stream(s)")
            codec = videos[0].codec_context
            if codec.width * codec.height > MAX_PIXELS:
                raise self._error(
                    f"frames of {codec.width} x {codec.height}, more than {MAX_PIXELS} pixels", "scale it"
                )
            codec.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change within the video
            if get_worker_info() is not None:  # other workers use the other cores
                codec.thread_type = "NONE"
                codec.thread_count = 1  # decoders with threads of their own only obey this
            yield container, videos[0]

    def _to_rgb(self, frame, reformatter) -> torch.Tensor:
        """The frame upright, (H, W, 3) uint8."""
        pixels = frame.format.name
        try:
            if pixels.startswith("yaf"):  # FFmpeg's scaler would abort the process
                raise ValueError("brightness and opacity alone")
            rgb = torch.from_numpy(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        except (ValueError, OSError) as error:
            raise self._error(f"pixels of the format {pixels} cannot be converted: {_one_line(error)}") from error
        turns = _quarter_turns(frame)
        return torch.rot90(rgb, turns).contiguous() if turns else rgb  # rot90 copies even for 0 turns

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
            raise reader._error(f"frames of sizes {sizes}", "pass a resizing transform to VideoReader.read")
        if not frames:
            return torch.empty(0, reader.height, reader.width, 3, dtype=torch.uint8)
        return torch.stack(frames)


def probe_video(source: Source) -> VideoInfo:
    """Number of frames, frame rate, duration, size and timestamps of a video; see [`VideoReader`]."""
    with VideoReader(source) as reader:
        return VideoInfo(*(getattr(reader, field) for field in VideoInfo._fields))


def _import_av():
    """PyAV, imported when the first video is decoded: it is not needed for clips given as tensors."""
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise ImportError("decoding video needs PyAV, which is not installed; run `pip install av`.") from error
    return av


def _open_file(source: Source) -> tuple[BinaryIO, str, bool]:
    """Returns a seekable binary file, its name for error messages, and whether we must close it."""
    is_path = isinstance(source, str | os.PathLike)
    is_bytes = isinstance(source, bytes | bytearray | memoryview)
    if is_path:
        name = os.fsdecode(source)
    elif is_bytes:
        name = "<bytes>"
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "<file object>"))
    else:
        raise ValueError(f"a video must be a path, bytes or a binary file, got {type(source).__name__}.")
    file = None
    try:
        if is_bytes:
            file = io.BytesIO(source)
        elif is_path:
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would block
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
    """The non-empty packets of a stream; an empty one would tell the decoder that the video ends."""
    return (packet for packet in container.demux(stream) if packet.size)


def _decode(stream, packet) -> list:
    """Sends one packet (None: the end) to the decoder and returns the frames that are ready."""
    return stream.decode(packet)


def _quarter_turns(frame) -> int:
    """The number of counterclockwise quarter turns that make the frame upright."""
    return round(frame.rotation / 90) % 4


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
