"""Frames from `video_decoding` against a full sequential decode, pixel for pixel, and its errors."""

import io
import os
import pickle
import random
import struct
import sys
import threading
import weakref
from fractions import Fraction
from itertools import accumulate, cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_inti.model import video_decoding
from hf_inti.model.video_decoding import VideoDecodingError, VideoReader, decode_frames, probe_video


av = pytest.importorskip("av")

DATA = os.environ.get("HF_INTI_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="HF_INTI_TEST_DATA is not set")
REAL_VIDEOS = sorted(Path(DATA, "videos").glob("*.*")) if DATA else []
REAL_VIDEOS = [path for path in REAL_VIDEOS if path.suffix in (".avi", ".mkv", ".mov", ".mp4", ".webm")]
BROKEN = ("corrupted.mp4", "result.webm")


def reference(path):
    """Every frame of the first video stream, upright: counterclockwise, as FFmpeg gives the rotation."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).copy())


def picture(index, width, height):
    """A textured picture that drifts, so that inter prediction is used, with noise of its own."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    rows = (np.arange(height) + index)[:, None] % 256
    columns = (np.arange(width) + 2 * index)[None] % 256
    noise = np.random.default_rng(index).integers(0, 8, (height, width, 3), dtype=np.uint8)
    return texture[rows, columns] // 8 * 7 + noise


def write_video(
    path,
    codec="libx264",
    n=60,
    size=(64, 48),
    pixels="yuv420p",
    pts=None,
    rate=25,
    rotation=0,
    muxer=None,
    **options,
):
    """Writes `n` pictures; `pts` in ms; `muxer` holds the container's options, `options` the codec's."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV lacks {codec}")
    with av.open(str(path), "w", options=muxer or {}) as container:
        options = {name.replace("_", "-"): str(value) for name, value in options.items()}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts = pts[i] if pts else i
            frame.time_base = Fraction(1, 1000) if pts else 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # SVT-AV1, run by root, gives its caller real-time priority, which starves all other processes.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", g=12)


def index_lists(n, seed=0):
    rng = random.Random(seed)
    yield [n - 1]
    yield [0, n - 1]
    yield [n // 2, 0, n // 2]
    yield [rng.randrange(n) for _ in range(16)]
    yield [min(n - 1, i * n // 16) for i in range(16)]
    yield list(range(n))
    for index in range(0, n, max(1, n // 16) | 1):  # alone, so that nothing before it is decoded for others
        yield [index]


def assert_exact(source, frames):
    """`source` gives `frames`, for every choice of indices."""
    with VideoReader(source) as reader:
        assert reader.num_frames == len(frames) == len(reader.timestamps)
        assert (reader.height, reader.width) == frames[0].shape[:2]
        for indices in index_lists(len(frames)):
            for index, frame in zip(indices, reader.read(indices), strict=True):
                assert frame.dtype == torch.uint8
                assert torch.equal(frame, frames[index]), (source, indices, index)


def test_a_wrong_frame_is_noticed(clip):
    frames = list(reference(clip))
    assert all(not torch.equal(a, b) for a, b in zip(frames, frames[1:], strict=False))
    with pytest.raises(AssertionError):
        assert_exact(clip, [frames[0], *frames[:-1]])


MILLISECONDS = list(accumulate(step for step, _ in zip(cycle([40, 1, 333]), range(60), strict=False)))
X265 = "keyint=20:open-gop=1:temporal-layers=3:log-level=none"
WRITTEN = {
    "gop 12": dict(name="x.mp4", g=12),
    "gop 250": dict(name="x.mp4", g=250, n=120),
    "open gop": dict(name="x.mkv", x264_params="keyint=15:open-gop=1:bframes=5:b-pyramid=normal", n=120),
    "no B": dict(name="x.mp4", bf=0, g=20),
    "gradual refresh, mp4": dict(name="x.mp4", x264_params="keyint=20:intra-refresh=1:bframes=0", n=120),
    "gradual refresh, mkv": dict(name="x.mkv", x264_params="keyint=20:intra-refresh=1", n=120),
    "all intra": dict(name="x.mp4", g=1),
    "variable rate, mp4": dict(name="x.mp4", pts=MILLISECONDS, g=12),
    "variable rate, mkv": dict(name="x.mkv", pts=MILLISECONDS),
    "fragmented": dict(name="x.mp4", g=12, muxer=FRAGMENTED),
    "no duration": dict(name="x.mkv", muxer={"live": "1"}, g=12),
    "rotated": dict(name="x.mov", rotation=-90, g=12),
    "upside down": dict(name="x.mov", rotation=180, g=12),
    "mpeg-ts": dict(name="x.ts", g=12),
    "mpeg-ps": dict(name="x.mpg", codec="mpeg2video"),
    "raw": dict(name="x.h264"),
    "flv": dict(name="x.flv"),
    "hevc": dict(name="x.mp4", codec="libx265", x265_params=X265),
    "vp9": dict(name="x.webm", codec="libvpx-vp9", g=20, cpu_used=8, deadline="realtime", lag_in_frames=16),
    "vp8": dict(name="x.webm", codec="libvpx", g=20, deadline="realtime"),
    "av1": dict(name="x.mp4", codec="libsvtav1", g=20, preset=12, n=30),
    "mpeg4": dict(name="x.avi", codec="mpeg4", g=12),
    "mpeg4, B": dict(name="x.avi", codec="mpeg4", bf=2),
    "h264 in avi": dict(name="x.avi", g=12),
    "mjpeg": dict(name="x.avi", codec="mjpeg", pixels="yuvj420p", n=9),
    "one frame": dict(name="x.mp4", n=1),
    "two frames": dict(name="x.mkv", n=2),
    "odd size": dict(name="x.mp4", size=(33, 17), pixels="yuv444p"),
    "10 bits": dict(name="x.mp4", pixels="yuv422p10le"),
    "grey": dict(name="x.mkv", codec="ffv1", pixels="gray", n=9),
    "alpha": dict(name="x.mov", codec="png", pixels="rgba", n=9),
    "palette": dict(name="x.gif", codec="gif", pixels="rgb8", n=9),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_written_files(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")
    arguments = dict(WRITTEN[kind])
    path = write_video(tmp_path / arguments.pop("name"), **arguments)
    frames = list(reference(path))
    assert len(frames) == arguments.get("n", 60)
    assert_exact(path, frames)


@needs_data
@pytest.mark.parametrize("path", REAL_VIDEOS, ids=lambda path: path.name)
def test_real_videos(path):
    if path.name in BROKEN:
        pytest.skip("cannot be decoded as a whole; tested below")
    assert_exact(path, list(reference(path)))


@needs_data
def test_real_datasets():
    paths = sorted(Path(DATA, "datasets").rglob("*.mp4"))[::400]
    paths += sorted(Path(DATA, "datasets").rglob("*.avi"))[::20]
    assert len(paths) > 5
    for path in paths:
        assert_exact(path, list(reference(path)))


@needs_data
def test_real_broken_videos():
    with pytest.raises(VideoDecodingError, match=r"result\.webm: empty file \("):
        VideoReader(Path(DATA, "videos", "result.webm"))
    path = Path(DATA, "videos", "corrupted.mp4")
    frames = []
    with pytest.raises(av.error.FFmpegError):
        frames.extend(reference(path))
    with VideoReader(path) as reader:
        for index, frame in enumerate(reader.read(range(len(frames)))):
            assert torch.equal(frame, frames[index])
        with pytest.raises(VideoDecodingError, match=r"corrupted\.mp4: frame 49 of 50 is corrupt or cut off"):
            reader.read([0, 49])


class NoSeek(io.BytesIO):
    def seekable(self):
        return False

    def seek(self, *args):
        raise io.UnsupportedOperation("seek")


def test_path_bytes_and_file_objects_give_the_same(clip):
    frames = list(reference(clip))
    data = clip.read_bytes()
    assert_exact(str(clip), frames)
    assert_exact(data, frames)
    assert_exact(bytearray(data), frames)
    assert_exact(NoSeek(data), frames)
    with open(clip, "rb") as file:
        file.seek(1000)  # read from the start all the same
        assert_exact(file, frames)
        assert not file.closed
    odd = clip.rename(clip.parent / "50% http:é %03d.mp4")  # patterns and protocols to FFmpeg
    assert_exact(odd, frames)


def test_conveniences(clip):
    frames = list(reference(clip))
    assert torch.equal(decode_frames(clip, [59, 0, 0]), torch.stack([frames[59], frames[0], frames[0]]))
    assert decode_frames(clip, []).shape == (0, 48, 64, 3)
    info = probe_video(clip)
    assert (info.num_frames, info.fps, info.width, info.height) == (60, 25.0, 64, 48)
    assert info.duration == pytest.approx(60 / 25)
    assert info.timestamps == pytest.approx([i / 25 for i in range(60)])


def test_timestamps_follow_the_file_not_the_rate(tmp_path):
    pts = [0, 10, 500, 510, 2000]
    info = probe_video(write_video(tmp_path / "clip.mkv", n=5, pts=pts))
    assert info.timestamps == pytest.approx([t / 1000 for t in pts])
    assert info.fps == pytest.approx(4 / 2)
    assert info.duration == pytest.approx(5 / 2)


def test_one_frame_has_a_sensible_rate(tmp_path):
    info = probe_video(write_video(tmp_path / "clip.mp4", n=1, rate=10))
    assert (info.num_frames, info.fps) == (1, 10.0)
    assert info.duration == pytest.approx(0.1)


@pytest.mark.parametrize("ticks", [7, 2**32 - 1])
def test_headers_are_not_trusted(clip, ticks):
    data = bytearray(clip.read_bytes())
    for box in (b"mvhd", b"mdhd", b"tkhd"):  # durations
        at = data.index(box) + (24 if box == b"tkhd" else 20)
        data[at : at + 4] = struct.pack(">I", ticks)
    assert probe_video(bytes(data)).num_frames == len(list(reference(clip)))


def test_hundreds_of_streams(tmp_path):
    """The first is read; the others cost no decoder."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mjpeg", rate=25) for _ in range(300)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for index, stream in enumerate(streams):
            frame = av.VideoFrame.from_ndarray(picture(index, 64, 48), format="rgb24")
            container.mux(stream.encode(frame) + stream.encode(None))
    assert_exact(path, list(reference(path)))
    assert probe_video(path).num_frames == 1


def test_edit_list_cuts_frames(clip):
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 16  # after version, number of entries and duration: where to start
    frame_ticks = 512  # of 25 frames a second, in mp4's 1/12800 s
    start = struct.unpack(">i", data[at : at + 4])[0]
    data[at : at + 4] = struct.pack(">i", start + 17 * frame_ticks)
    clip.write_bytes(data)
    frames = list(reference(clip))
    assert len(frames) == 60 - 17
    assert_exact(clip, frames)


def remux(path, change):
    """Copies a video packet by packet, with what `change(position, data)` makes of the data of each."""
    copy = path.with_stem("copy")
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for position, packet in enumerate(source.demux(video=0)):
            if packet.size:
                changed = av.Packet(change(position, bytes(packet)))
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.is_keyframe, changed.stream = packet.is_keyframe, stream
                target.mux(changed)
    return copy


def test_packets_that_show_nothing_are_not_counted(tmp_path):
    def hide_vp8(position, data):
        return bytes([data[0] & ~0x10]) + data[1:] if position in (7, 30) else data

    # an MPEG-4 P frame of which the bit "coded" is 0
    def drop_mpeg4(position, data):
        return (
            b"\0\0\1\xb6" + int("0101" + f"{position % 25:05b}" + "1001111", 2).to_bytes(2, "big")
            if position == 30
            else data
        )

    vp8 = write_video(tmp_path / "clip.webm", codec="libvpx", deadline="realtime")
    for path, change, hidden in (
        (vp8, hide_vp8, 2),
        (write_video(tmp_path / "clip.mp4", codec="mpeg4", bf=0, g=60), drop_mpeg4, 1),
    ):
        path = remux(path, change)
        frames = list(reference(path))
        assert len(frames) == 60 - hidden
        assert_exact(path, frames)


@pytest.mark.parametrize("position", [0, 3, 12, 25, 29, 36, 50])
def test_concealed_damage_looks_the_same_as_in_a_full_decode(tmp_path, position):
    def damage(at, data):
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :] if at == position else data

    path = remux(write_video(tmp_path / "clip.mp4", g=12, size=(160, 120)), damage)
    frames = list(reference(path))
    assert any(not torch.equal(a, b) for a, b in zip(frames, reference(path.with_stem("clip")), strict=True))
    assert_exact(path, frames)


def test_rotation_turns_the_right_way(tmp_path):
    upright = decode_frames(write_video(tmp_path / "a.mp4", n=3), [0])[0]
    clockwise = decode_frames(write_video(tmp_path / "b.mp4", n=3, rotation=-90), [0])[0]
    # the top left corner goes to the top right
    assert clockwise.shape == (64, 48, 3)
    assert torch.equal(clockwise[0, -1], upright[0, 0]) and torch.equal(clockwise[-1, -1], upright[0, -1])


def test_frames_of_several_sizes(tmp_path):
    a = write_video(tmp_path / "a.ts", n=10).read_bytes()
    b = write_video(tmp_path / "b.ts", n=10, size=(96, 32)).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(a + b)
    frames = list(reference(path))
    assert {tuple(frame.shape) for frame in frames} == {(48, 64, 3), (32, 96, 3)}
    assert_exact(path, frames)
    with pytest.raises(VideoDecodingError, match=r"both\.ts: frames of sizes \[\(32, 96\), \(48, 64\)\]"):
        decode_frames(path, [0, len(frames) - 1])


def test_frames_of_any_size_are_not_decoded(tmp_path, monkeypatch):
    """Neither those that the file begins with nor larger ones that come later."""
    a = write_video(tmp_path / "a.ts", n=10).read_bytes()
    b = write_video(tmp_path / "b.ts", n=10, size=(96, 48)).read_bytes()
    (tmp_path / "both.ts").write_bytes(a + b)
    with VideoReader(tmp_path / "both.ts") as reader:
        assert reader.num_frames > 10
    monkeypatch.setattr(video_decoding, "MAX_PIXELS", 64 * 48)
    with VideoReader(tmp_path / "both.ts") as reader:
        assert 0 < reader.num_frames <= 10
    with pytest.raises(VideoDecodingError, match=r"b\.ts: frames of 96 x 48, more than 3072 pixels \(scale it\)"):
        VideoReader(tmp_path / "b.ts")


@pytest.mark.parametrize("wrong", [-1, 60, 1.0, "1", None])
def test_indices_are_checked(clip, wrong):
    with VideoReader(clip) as reader, pytest.raises(ValueError, match="must be (from 0 to 59|an integer).*, got "):
        reader.read([0, wrong])


def test_indices_may_be_tensors_and_repeats_share_a_tensor(clip):
    with VideoReader(clip) as reader:
        first, second, third = reader.read(torch.tensor([7, 3, 7]))
    assert first is third and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])
def test_transform_sees_each_frame_once_and_no_frame_is_kept(tmp_path, name):
    path = write_video(tmp_path / name, g=12)
    seen, alive = [], []

    def transform(frame):
        seen.append(weakref.ref(frame))
        alive.append(sum(ref() is not None for ref in seen))
        return frame.float().mean()

    with VideoReader(path) as reader:
        means = reader.read([50, 1, 20, 30, 50, 40, 1], transform)
    assert len(seen) == 5 and max(alive) <= 2
    frames = list(reference(path))
    assert means == [frames[i].float().mean() for i in [50, 1, 20, 30, 50, 40, 1]]


def test_an_error_of_the_transform_is_passed_on(clip):
    def transform(frame):
        raise KeyError("mine")

    with VideoReader(clip) as reader:
        with pytest.raises(KeyError, match="mine"):
            reader.read([5], transform)
        assert len(reader.read([5])) == 1


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def together(results):
    """A transform that only goes on when two threads are in it at once, each for the first time."""
    threads, both = set(), threading.Barrier(2)

    def transform(frame):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait(timeout=60)
        return results(frame)

    return transform


def test_parts_are_decoded_side_by_side(clip, two_threads):
    frames = list(reference(clip))
    for source in (clip, clip.read_bytes(), io.BytesIO(clip.read_bytes())):
        assert_exact(source, frames)
        with VideoReader(source) as reader:
            got = reader.read([50, 3, 30, 50], together(lambda frame: frame))
            assert all(torch.equal(frame, frames[i]) for frame, i in zip(got, [50, 3, 30, 50], strict=True))
            got[1].zero_()  # of nobody else
            assert torch.equal(reader.read([3])[0], frames[3])


def test_what_goes_wrong_in_one_part_is_told(clip, two_threads):
    main = threading.get_ident()

    def fail_beside(frame):
        if threading.get_ident() != main:
            raise KeyError("mine")

    with VideoReader(clip) as reader:
        with pytest.raises(KeyError, match="mine"):
            reader.read([3, 50], together(fail_beside))
        assert len(reader.read([3, 50])) == 2


def test_one_thread_decodes_where_others_have_work(clip, two_threads, monkeypatch):
    def idents(source):
        with VideoReader(source) as reader:
            return set(reader.read([3, 30, 50], lambda frame: threading.get_ident()))

    with open(clip, "rb") as file:  # which cannot be read in two places at once
        assert idents(file) == {threading.get_ident()}
    monkeypatch.setattr(video_decoding, "get_worker_info", lambda: "a worker")
    assert idents(clip) == {threading.get_ident()}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_few_packets_are_decoded(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / name, n=600, g=12)
    packets = []
    decode = video_decoding._decode
    monkeypatch.setattr(video_decoding, "_decode", lambda *args: packets.append(args) or decode(*args))
    with VideoReader(path) as reader:
        assert reader.num_frames == 600 and len(packets) < 10
        for index in (5, 300, 595):
            packets.clear()
            reader.read([index])
            assert len(packets) <= 24, index
        packets.clear()
        reader.read([5, 300, 302, 595])
        assert len(packets) <= 3 * 24


@pytest.mark.parametrize(
    "name, muxer",
    [
        ("clip.mkv", {}),
        ("clip.ts", {}),
        ("clip.avi", {}),
        ("clip.mp4", {"movflags": "faststart"}),
        ("clip.mp4", FRAGMENTED),
    ],
)
def test_truncated(tmp_path, name, muxer):
    path = write_video(tmp_path / name, g=12, muxer=muxer, size=(160, 120))
    data = path.read_bytes()
    counts = set()
    for share in (0.03, 0.35, 0.6, 0.61, 0.9, 0.999):
        path.write_bytes(data[: int(share * len(data))])
        frames = []
        try:
            for frame in reference(path):
                frames.append(frame)
        except av.error.FFmpegError:
            pass
        if frames:
            assert_exact(path, frames)
        else:
            with pytest.raises(VideoDecodingError, match=name):
                VideoReader(path)
        counts.add(len(frames))
    assert len(counts) >= 4  # the cuts do cut


def test_a_ruined_frame_is_an_error_but_frames_elsewhere_are_not(clip):
    frames = list(reference(clip))
    with av.open(str(clip)) as container:
        keys = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.is_keyframe]
    data = bytearray(clip.read_bytes())
    position, size = keys[2]
    data[position : position + size] = bytes([255]) * size
    clip.write_bytes(data)
    with VideoReader(clip) as reader:
        for index in (0, 10, 20, 50, 59):  # the third group of twelve is 24 to 35
            assert torch.equal(reader.read([index])[0], frames[index])
        with pytest.raises(VideoDecodingError, match=r"clip\.mp4: frame 24 of 60 is corrupt or cut off"):
            reader.read([0, 24])


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 1024), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_bad_sources(tmp_path):
    (tmp_path / "text.mp4").write_text("hello, this is no video\n" * 100)
    (tmp_path / "subtitles.mp4").write_text("1\n00:00:01,000 --> 00:00:02,000\nhi\n\n" * 5)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "zeros.mp4").write_bytes(bytes(10_000))
    os.mkfifo(tmp_path / "pipe.mp4")
    write_audio(tmp_path / "audio.mp4")
    reasons = {
        "text": "not a video",
        "subtitles": "not a video",
        "empty": "empty file",
        "folder": "directory",
        "zeros": "not a video",
        "pipe": "device",
        "audio": "no video",
        "missing": "No such file",
    }
    for name, reason in reasons.items():
        path = tmp_path / f"{name}.mp4"
        with pytest.raises(VideoDecodingError, match=rf"{name}\.mp4: .*{reason}.* \(.+\)$") as error:
            VideoReader(path)
        assert "\n" not in str(error.value)
        if path.is_file():
            with pytest.raises(VideoDecodingError, match=f"<bytes>: .*{reason}"):
                decode_frames(path.read_bytes(), [0])
            with open(path, "rb") as file:
                with pytest.raises(VideoDecodingError, match=rf"{name}\.mp4: .*{reason}"):
                    probe_video(file)


def test_only_containers_of_videos_are_opened(tmp_path):
    """FFmpeg would show a text as a terminal does, and take a picture for a video."""
    (tmp_path / "hello.txt").write_text("hello, this is no video\n" * 50)
    (tmp_path / "picture.mp4").write_bytes(float_picture())
    for path in tmp_path.iterdir():
        with av.open(str(path)) as container:
            assert container.streams.video
        with pytest.raises(VideoDecodingError, match=rf"{path.name}: not a video that can be opened"):
            VideoReader(path)


def float_picture() -> bytes:
    """An OpenEXR file of 8 x 8 pixels with brightness and opacity, as floats."""

    def attribute(name, kind, value):
        return b"\0".join((name, kind, struct.pack("<i", len(value)) + value))

    names, box = (b"A", b"Y"), struct.pack("<4i", 0, 0, 7, 7)
    head = b"\x76\x2f\x31\x01\2\0\0\0" + b"".join(
        (
            attribute(b"channels", b"chlist", b"".join(n + struct.pack("<xi4x2i", 2, 1, 1) for n in names) + b"\0"),
            attribute(b"compression", b"compression", b"\0"),
            attribute(b"dataWindow", b"box2i", box),
            attribute(b"displayWindow", b"box2i", box),
            attribute(b"lineOrder", b"lineOrder", b"\0"),
            attribute(b"pixelAspectRatio", b"float", struct.pack("<f", 1)),
            attribute(b"screenWindowCenter", b"v2f", bytes(8)),
            attribute(b"screenWindowWidth", b"float", struct.pack("<f", 1)),
            b"\0",
        )
    )
    lines = [struct.pack("<2i", row, 64) + struct.pack("<16f", *[0.5] * 16) for row in range(8)]
    offsets = [len(head) + 64 + 72 * row for row in range(8)]
    return head + struct.pack("<8Q", *offsets) + b"".join(lines)


def test_pixels_that_cannot_be_converted(tmp_path):
    """Of one kind FFmpeg says so; another would end the process."""
    with av.open(str(tmp_path / "four_bits.nut"), "w") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb4"
        frame = av.VideoFrame(16, 16, "rgb4")
        frame.pts = 0
        container.mux(stream.encode(frame))
    with av.open(io.BytesIO(float_picture())) as source, av.open(str(tmp_path / "floats.mov"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.pts, packet.dts = stream, 0, 0
                container.mux(packet)
    for name, pixels in {"four_bits.nut": "rgb4", "floats.mov": "yaf32le"}.items():
        with VideoReader(tmp_path / name) as reader:
            with pytest.raises(VideoDecodingError, match=f"{name}: pixels of the format {pixels} cannot be converted"):
                reader.read([0])


@pytest.mark.parametrize("start", [2**60, -(2**60)])
def test_a_clock_so_late_that_floats_do_not_tell_frames_apart(tmp_path, start):
    near, far = write_video(tmp_path / "near.mkv", "mpeg4", n=2), tmp_path / "far.mkv"
    with av.open(str(near)) as source, av.open(str(far), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts + start, packet.dts + start
                container.mux(packet)
    info = probe_video(far)
    assert info.timestamps == [0, 1 / info.fps] and info.fps == pytest.approx(25, rel=0.01)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read any file")
def test_unreadable_file(clip):
    clip.chmod(0)
    with pytest.raises(VideoDecodingError, match=r"clip\.mp4: Permission denied"):
        VideoReader(clip)


class Failing(io.BytesIO):
    name = "remote.mp4"
    broken = False

    def read(self, *args):
        if self.broken:
            raise RuntimeError("connection\nlost")
        return super().read(*args)


def test_a_file_object_that_fails(clip):
    file = Failing(clip.read_bytes())
    with VideoReader(file) as reader:
        file.broken = True
        with pytest.raises(VideoDecodingError, match="remote.mp4: .*connection lost"):
            reader.read([3])
    with pytest.raises(VideoDecodingError, match="remote.mp4: connection lost"):
        VideoReader(file)
    with pytest.raises(VideoDecodingError, match="text"):
        VideoReader(io.StringIO("text"))
    with pytest.raises(ValueError, match="got int"):
        VideoReader(3)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to count open files")
def test_files_are_closed(clip, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    before = len(os.listdir("/proc/self/fd"))
    with VideoReader(clip) as reader:
        reader.read([0, 30])
        with pytest.raises(ValueError):
            reader.read([60])
    for _ in range(5):
        with pytest.raises(VideoDecodingError):
            VideoReader(tmp_path / "text.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoDecodingError("clip.mp4: empty file (replace it)")))
    assert type(error) is VideoDecodingError and str(error) == "clip.mp4: empty file (replace it)"


class Clips(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return decode_frames(self.paths[index], [0, 30, 59])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_dataloader_workers(clip, tmp_path):
    (tmp_path / "empty.mp4").touch()
    batches = iter(DataLoader(Clips([clip, tmp_path / "empty.mp4"]), batch_size=None, num_workers=1))
    frames = list(reference(clip))
    assert torch.equal(next(batches), torch.stack([frames[i] for i in (0, 30, 59)]))
    with pytest.raises(VideoDecodingError, match=r"empty\.mp4: empty file"):
        next(batches)


def test_without_pyav(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install av"):
        VideoReader(clip)


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile other.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{folder}/other.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.sdp"])
def test_playlists_reach_no_other_file(playlist, name, tmp_path):
    write_video(tmp_path / "other.mp4")
    path = tmp_path / name
    path.write_text(playlist.format(folder=tmp_path))
    file = io.BytesIO(path.read_bytes())
    file.name = str(path)
    for source in (path, path.read_bytes(), file):
        with pytest.raises(VideoDecodingError):
            probe_video(source)
