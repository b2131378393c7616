"""The video processor: sampling, parity with CLIP, views, kinds of input, options and errors."""

import http.server
import io
import os
import pickle
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from forks import run_in_a_fork
from hf_inti.model import video_decoding, video_processing_inti_clip
from hf_inti.model.video_decoding import VideoDecodingError
from hf_inti.model.video_processing_inti_clip import InTIClipVideoProcessor, crop, sample_indices


PLAIN = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def noisy_frames(num_frames, height, width, seed=0):
    """Smooth shapes with sharp edges and noise, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    t, y, x, c = np.meshgrid(*(np.arange(n) for n in (num_frames, height, width, 3)), indexing="ij")
    waves = 127 + 90 * np.sin(x / 9 + t) * np.cos(y / 13 - c) + 60 * ((x // 11 + y // 17) % 2)
    return (waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)


def numbered_frames(num_frames, height=6, width=8):
    """Frame t is grey level t everywhere, uint8 (T, H, W, 3)."""
    return np.arange(num_frames, dtype=np.uint8).repeat(height * width * 3).reshape(-1, height, width, 3)


def write_video(path, frames):
    """Lossless, so that decoding must give back exactly these frames."""
    av = pytest.importorskip("av", reason="PyAV is needed to write and decode video files")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.pix_fmt, stream.height, stream.width = "bgr0", *frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_uniform_sampling_by_hand():
    assert sample_indices(32, num_frames=4) == [4, 12, 20, 28]
    assert sample_indices(10, num_frames=4) == [1, 3, 6, 8]
    assert sample_indices(12, num_frames=2, num_clips=2, clip=0) == [2, 8]
    assert sample_indices(12, num_frames=2, num_clips=2, clip=1) == [4, 10]
    assert sample_indices(3, num_frames=6) == [0, 0, 1, 1, 2, 2]
    assert sample_indices(1, num_frames=3) == [0, 0, 0]


def test_uniform_sampling_stays_in_its_segments():
    generator = torch.Generator().manual_seed(0)
    for total in (1, 2, 7, 16, 99, 1000):
        for num_frames in (1, 4, 16):
            segment = Fraction(total, num_frames)
            for clip in range(3):
                exact = [segment * (i + Fraction(clip + 1, 4)) for i in range(num_frames)]
                got = sample_indices(total, num_frames=num_frames, clip=clip, num_clips=3)
                assert got == [int(point) for point in exact]
            drawn = sample_indices(total, num_frames=num_frames, generator=generator)
            assert drawn == sorted(drawn) and 0 <= drawn[0] and drawn[-1] < total
            assert all(int(segment * i) <= index <= segment * (i + 1) for i, index in enumerate(drawn))


def test_random_uniform_sampling_is_even_and_reproducible():
    generator = torch.Generator().manual_seed(0)
    draws = [sample_indices(10, num_frames=4, generator=generator) for _ in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert counts == pytest.approx(np.full(10, 800), rel=0.15)  # 8000 draws of 10 frames
    again = torch.Generator().manual_seed(0)
    assert [sample_indices(10, num_frames=4, generator=again) for _ in range(2000)] == draws


def test_dense_sampling():
    dense = {"num_frames": 4, "sampling": "dense", "frame_stride": 5}
    assert sample_indices(30, **dense) == [5, 10, 15, 20]  # the window of 20 frames in the centre
    assert sample_indices(30, **dense, num_clips=3, clip=0) == [0, 5, 10, 15]
    assert sample_indices(30, **dense, num_clips=3, clip=1) == [5, 10, 15, 20]
    assert sample_indices(30, **dense, num_clips=3, clip=2) == [10, 15, 20, 25]
    assert sample_indices(8, **dense) == [0, 5, 7, 7]  # the last frame stands in for the missing ones
    generator = torch.Generator().manual_seed(0)
    draws = [sample_indices(30, **dense, generator=generator) for _ in range(300)]
    assert {draw[0] for draw in draws} == set(range(11))
    assert all(np.diff(draw).tolist() == [5, 5, 5] for draw in draws)


def test_sampling_refuses_nonsense():
    for options in ({"num_frames": 0}, {"num_frames": 4, "clip": 1}, {"num_frames": 4, "sampling": "dense"}):
        with pytest.raises(ValueError, match="must be"):
            sample_indices(10, **options)
    with pytest.raises(ValueError, match="total must be an integer of at least 1, got 0"):
        sample_indices(0, num_frames=4)
    with pytest.raises(ValueError, match="uniform, dense, got 'middle'"):
        sample_indices(10, num_frames=4, sampling="middle")


def difference_from_clip(frames, **options):
    """Largest and mean absolute difference from CLIP's PIL preprocessing, in grey levels."""
    options = {"do_normalize": False, **options}
    wanted = CLIPImageProcessorPil(**options)([Image.fromarray(f) for f in frames], return_tensors="pt")
    got = InTIClipVideoProcessor(**options, do_sample_frames=False)(frames)
    difference = 255 * (got.pixel_values[0] - wanted.pixel_values).abs()
    return difference.max().item(), difference.mean().item()


SIZES = [(240, 320), (320, 240), (100, 300), (300, 100), (224, 224), (61, 47), (257, 500), (719, 405)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_agrees_with_clip(height, width):
    largest, mean = difference_from_clip(noisy_frames(2, height, width))
    assert largest < 2.01 and mean < 0.02  # of 255: they round differently inside
    if (height, width) == (224, 224):
        assert largest < 1e-3


def test_agrees_with_clip_on_real_video():
    if "HF_INTI_TEST_DATA" not in os.environ:
        pytest.skip("HF_INTI_TEST_DATA is not set: no real videos")
    path = Path(os.environ["HF_INTI_TEST_DATA"]) / "videos" / "demo.mp4"
    frames = InTIClipVideoProcessor().load_frames(path, num_frames=3, do_resize=False)
    largest, mean = difference_from_clip(frames.permute(0, 2, 3, 1).numpy())
    assert largest < 2.01 and mean < 0.02


def test_normalisation_agrees_with_clip():
    frames = noisy_frames(2, 224, 224)
    wanted = CLIPImageProcessorPil()([Image.fromarray(f) for f in frames], return_tensors="pt").pixel_values
    processor = InTIClipVideoProcessor(do_sample_frames=False)
    torch.testing.assert_close(processor(frames).pixel_values[0], wanted, atol=1e-5, rtol=0)
    floats = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(processor.rescale_and_normalize(floats), wanted, atol=1e-5, rtol=0)
    half = processor(frames, image_mean=0.45, image_std=[0.225]).pixel_values
    torch.testing.assert_close(half[0], ((floats / 255 - 0.45) / 0.225).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (31, 41), (30, 90), (91, 30), (64, 64), (65, 71)])
def test_crop_pads_as_clip_does(height, width):
    options = {"do_resize": False, "crop_size": {"height": 64, "width": 64}}
    assert difference_from_clip(noisy_frames(1, height, width), **options)[0] < 1e-3


def test_the_check_of_parity_can_fail():
    frames = noisy_frames(1, 240, 320)
    bilinear = InTIClipVideoProcessor(do_normalize=False)(frames, num_frames=1, resample=2).pixel_values[0]
    clip = CLIPImageProcessorPil(do_normalize=False)
    wanted = clip(Image.fromarray(frames[0]), return_tensors="pt").pixel_values
    assert 255 * (bilinear - wanted).abs().mean() > 0.05


def test_three_crops_along_the_longer_side():
    columns = torch.arange(10).expand(3, 4, 10)
    for frame, axis in ((columns, 2), (columns.transpose(1, 2), 1)):
        cuts = [crop(frame, 4, 4, place) for place in (0, 1, 2)]
        assert all(cut.shape == (3, 4, 4) for cut in cuts)
        firsts = [cut.unique(dim=axis).flatten().unique().tolist() for cut in cuts]
        assert firsts == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    wide = torch.arange(9).expand(3, 6, 9)  # both sides leave room: the shorter one is always centred
    assert [crop(wide, 4, 5, place)[0, 0].tolist()[0] for place in (0, 1, 2)] == [0, 2, 4]


def test_views_are_clip_major():
    frames = numbered_frames(12, 4, 8)
    frames[..., 4:, 1] += 100  # the right half is marked in green
    cropped = {**PLAIN, "do_center_crop": True, "crop_size": {"height": 4, "width": 4}}
    processor = InTIClipVideoProcessor(**cropped, num_frames=2, num_clips=2, num_crops=3)
    views = processor(frames).pixel_values
    assert views.shape == (1, 6, 2, 3, 4, 4) and views.is_contiguous()
    assert views[0, :, :, 0, 0, 0].tolist() == [[2, 8]] * 3 + [[4, 10]] * 3  # clips 0, 1
    assert processor(frames, num_clips=1).pixel_values.is_contiguous()
    marked = (views[0, :, 0, 1] - views[0, :, 0, 0]).mean(dim=(1, 2))
    assert marked.tolist() == [0, 50, 100, 0, 50, 100]  # left, centre, right


def test_kinds_of_arrays():
    frames = noisy_frames(4, 20, 30)
    tensor = torch.from_numpy(frames)
    read_only = frames.copy()
    read_only.setflags(write=False)
    processor = InTIClipVideoProcessor(**PLAIN, num_frames=4)
    same = {
        "tensor": tensor,
        "channels first": tensor.permute(0, 3, 1, 2),
        "float": frames / 255,
        "float32": tensor.float() / 255,
        "alpha": np.concatenate([frames, np.full_like(frames[..., :1], 7)], axis=-1),
        "read-only": read_only,
        "negative strides": frames[::-1].copy()[::-1],
        "PIL": [Image.fromarray(f) for f in frames],
        "list": list(frames),
        "list of tensors": list(tensor.permute(0, 3, 1, 2)),
        "tuple": tuple(frames),
        "batch array": frames[None],
        "batch": [frames],
        "nested": [list(frames)],
    }
    wanted = tensor.permute(0, 3, 1, 2)[None].float()
    for kind, video in same.items():
        assert torch.equal(processor(video).pixel_values, wanted), kind

    between = processor(np.full((4, 5, 6, 3), 99.6 / 255)).pixel_values
    assert between.unique().tolist() == [100]  # rounded, not cut off

    grey = wanted[:, :, :1].expand(-1, -1, 3, -1, -1)
    for video in (frames[..., :1], list(frames[..., 0]), [Image.fromarray(f) for f in frames[..., 0]]):
        assert torch.equal(processor(video).pixel_values, grey)
    # Size 3 decides before sizes 1 and 4: these are 4 pixels high and wide.
    assert processor(frames[:, :4]).pixel_values.shape == (1, 4, 3, 4, 30)
    assert processor(tensor.permute(0, 3, 1, 2)[..., :4]).pixel_values.shape == (1, 4, 3, 20, 4)
    assert processor([frames, tensor[:2], list(frames)]).pixel_values.shape == (3, 4, 3, 20, 30)
    assert isinstance(processor(frames, return_tensors="np").pixel_values, np.ndarray)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], r"must not be empty, got \[\]"),
        (np.zeros((0, 9, 9, 3), np.uint8), "at least one frame"),
        (np.zeros((9, 9, 3), np.uint8), r"got shape \(9, 9, 3\)"),
        (np.zeros((2, 9, 9, 5), np.uint8), r"got \(9, 9, 5\)"),
        (np.zeros((2, 3, 9, 3), np.uint8), r"got \(3, 9, 3\)"),
        (np.zeros((2, 9, 9, 3), np.int64), "uint8, or float in .*int64"),
        (np.zeros((2, 9, 9, 3), object), "uint8, or float in .*object"),
        (np.zeros((2, 9, 9, 3), ">f4"), "uint8, or float in .*>f4"),
        (np.zeros((2, 0, 9, 3), np.uint8), r"at least one pixel, got shape \(0, 9, 3\)"),
        (torch.zeros(2, 3, 9, 0), r"at least one pixel, got shape \(3, 9, 0\)"),
        ([Image.new("RGB", (0, 9))], "at least one pixel, got mode RGB, 0 x 9"),
        ([Image.new("I;16", (9, 9), 4000)], "8 bits per channel.*got mode I;16"),
        ([Image.new("F", (9, 9), 0.5)], "8 bits per channel.*got mode F"),
        ({}, "got NoneType"),
        (np.full((2, 9, 9, 3), 7.0), r"\[0, 1\], got \[7, 7\]"),
        (np.full((2, 9, 9, 3), np.nan), r"\[0, 1\], got \[nan, nan\]"),
        ([np.zeros((9, 9, 3), np.uint8), "a.mp4"], "mixture"),
        ([np.zeros((9, 9, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "frames must have one shape"),
        (Image.new("RGB", (9, 9)), "got Image"),
        ([["a.png", "b.png"]], "got str"),
        (5, "got int"),
        (None, "got NoneType"),
    ],
)
def test_refuses_what_is_no_video(video, message):
    with pytest.raises(ValueError, match=message):
        InTIClipVideoProcessor(**PLAIN, num_frames=2)(video)


def test_videos_that_do_not_stack():
    batch = [noisy_frames(2, 20, 30), noisy_frames(3, 20, 30)]
    assert InTIClipVideoProcessor()(batch).pixel_values.shape == (2, 16, 3, 224, 224)
    with pytest.raises(ValueError, match="videos must have one shape"):
        InTIClipVideoProcessor()(batch, do_sample_frames=False)


@pytest.fixture
def video_file(tmp_path):
    return write_video(tmp_path / "numbers.mkv", numbered_frames(12, 20, 30))


def levels(pixel_values):
    """The grey level of the frames of the first video; each frame must be of one level."""
    assert pixel_values.amax((2, 3, 4)).tolist() == pixel_values.amin((2, 3, 4)).tolist()
    return pixel_values[0, :, 0, 0, 0].tolist()


def test_kinds_of_files(video_file):
    processor = InTIClipVideoProcessor(**PLAIN, num_frames=3)
    content = video_file.read_bytes()
    with open(video_file, "rb") as file:
        kinds = [
            video_file, str(video_file), content, file, io.BytesIO(content),
            bytearray(content), memoryview(content), [video_file],
            {"path": str(video_file), "bytes": None}, {"path": "gone.mkv", "bytes": content},
        ]  # fmt: skip
        for kind in kinds:
            assert levels(processor(kind).pixel_values) == [2, 6, 10]
    batch = processor([str(video_file), content, numbered_frames(12, 20, 30)]).pixel_values
    assert batch.shape == (3, 3, 3, 20, 30)
    assert torch.equal(batch[0], batch[1]) and torch.equal(batch[0], batch[2])
    assert levels(processor(video_file, do_sample_frames=False).pixel_values) == list(range(12))
    assert levels(processor(video_file, sampling="dense", frame_stride=2).pixel_values) == [3, 5, 7]


def test_broken_files_are_named(video_file, tmp_path):
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(b"no video at all")
    processor = InTIClipVideoProcessor()
    for batch in ([video_file, broken], [{"path": str(broken), "bytes": broken.read_bytes()}]):
        with pytest.raises(VideoDecodingError, match="broken.mkv"):
            processor(batch)
    with pytest.raises(VideoDecodingError, match="video 1"):
        processor([video_file.read_bytes(), b"no video at all"])
    with pytest.raises(VideoDecodingError, match="gone.mkv"):
        processor(tmp_path / "gone.mkv")


@pytest.fixture
def server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/numbers.mkv")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls(server, video_file, tmp_path):
    processor = InTIClipVideoProcessor(**PLAIN, num_frames=3)
    for name in ("numbers.mkv", "moved"):
        assert levels(processor(f"{server}/{name}").pixel_values) == [2, 6, 10]
    (tmp_path / "page.mp4").write_text("<html>not a video</html>")
    for url in (f"{server}/gone.mp4", f"{server}/page.mp4", "http://127.0.0.1:1/closed.mp4", "http://[/bad"):
        with pytest.raises(VideoDecodingError) as error:
            processor(url)
        assert url in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(VideoDecodingError, match="404"):
        processor(f"{server}/gone.mp4")


def test_each_frame_is_resized_as_it_is_decoded(monkeypatch):
    decoded = []

    class Reader:
        num_frames = 40

        def __init__(self, source):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, indices, transform):
            frames = {}
            for i in sorted(set(indices)):
                decoded.append(i)
                frames[i] = transform(torch.full((360, 480, 3), i, dtype=torch.uint8))
                # What is kept must not hold on to the decoded frame.
                assert all(crop.untyped_storage().nbytes() <= 3 * 3 * 32 * 32 for crop in frames[i])
            return [frames[i] for i in indices]

    monkeypatch.setattr(video_processing_inti_clip, "VideoReader", Reader)
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False}
    processor = InTIClipVideoProcessor(**options, num_frames=16, num_clips=4, num_crops=3)
    views = processor("any.mp4").pixel_values
    assert views.shape == (1, 12, 16, 3, 32, 32)
    wanted = [[int(Fraction(40, 16) * (i + Fraction(k + 1, 5))) for i in range(16)] for k in range(4)]
    assert (255 * views[0, ::3, :, 0, 0, 0]).round().int().tolist() == wanted
    assert decoded == sorted({i for clip in wanted for i in clip})


def test_views_decode_and_resize_each_frame_once(tmp_path, monkeypatch):
    frames = noisy_frames(40, 48, 64)
    path = write_video(tmp_path / "clip.mkv", frames)
    counts = {"_to_rgb": 0, "resize": 0}

    def count(module, name):
        function = getattr(module, name)

        def counted(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(module, name, counted)

    count(video_decoding.VideoReader, "_to_rgb")
    count(video_processing_inti_clip, "resize")
    processor = InTIClipVideoProcessor(num_frames=16, num_clips=4, num_crops=3, size=32, crop_size=32)
    views = processor(path).pixel_values
    wanted = {i for clip in range(4) for i in sample_indices(40, num_frames=16, num_clips=4, clip=clip)}
    assert len(wanted) < 4 * 16 and counts == {"_to_rgb": len(wanted), "resize": len(wanted)}
    assert torch.equal(views, processor(frames).pixel_values)


def test_crops_do_not_hold_on_to_frames_that_are_not_resized(monkeypatch):
    kept, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: kept.extend(tensors) or stack(tensors))
    InTIClipVideoProcessor(do_resize=False, crop_size=8)(noisy_frames(4, 90, 120))
    assert len(kept) == 16 and all(crop.untyped_storage().nbytes() == 3 * 8 * 8 for crop in kept)


def test_load_frames_and_finish_make_up_a_call():
    frames = noisy_frames(9, 60, 80)
    processor = InTIClipVideoProcessor(num_frames=4, num_clips=3, num_crops=3)
    loaded = processor.load_frames(frames)
    assert loaded.shape == (4, 3, 224, 298) and loaded.dtype == torch.uint8
    assert processor.load_frames(frames, 2).shape[0] == 2
    single = processor(frames, num_clips=1, num_crops=1).pixel_values[0]
    assert torch.equal(processor.rescale_and_normalize(crop(loaded, 224, 224)), single)
    assert processor.load_frames(frames, do_sample_frames=False).shape == (9, 3, 224, 298)
    again = processor.load_frames(loaded, num_frames=4)  # already of the right size: untouched
    assert torch.equal(again, loaded) and again.data_ptr() != loaded.data_ptr()

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    draws = [processor.load_frames(numbered_frames(40), generator=generator) for generator in generators]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    kept = loaded.float()
    processor.rescale_and_normalize(kept)
    assert torch.equal(kept, loaded.float())  # not changed in place
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, H, W\), got \(4, 298, 3\)"):
        processor.rescale_and_normalize(torch.zeros(4, 298, 3))


BAD_OPTIONS = [
    ({"num_frames": 0}, "num_frames must be an integer of at least 1, got 0"),
    ({"num_frames": "8"}, "num_frames"),
    ({"num_clips": 0}, "num_clips must be"),
    ({"sampling": "unifrom"}, "uniform, dense, got 'unifrom'"),
    ({"sampling": "dense"}, "frame_stride must be"),
    ({"num_crops": 2}, "1 or 3, got 2"),
    ({"num_crops": 3, "do_center_crop": False}, "do_center_crop must be True with num_crops = 3, got False"),
    ({"num_clips": 2, "do_sample_frames": False}, "num_clips must be 1 with do_sample_frames = False, got 2"),
    ({"resample": 1}, "bicubic"),
    ({"size": {"longest_edge": 9}}, "shortest_edge or height and width"),
    ({"size": {"shortest_edge": 0}}, "shortest_edge must be"),
    ({"crop_size": {"shortest_edge": 9}}, "crop_size must have height and width"),
    ({"image_mean": [0.1, 0.2]}, "image_mean"),
    ({"image_std": [0.1, 0.0, 0.1]}, "not 0"),
    ({"do_resize": "yes"}, "do_resize"),
    ({"samplng": "dense"}, "has no option 'samplng'; its options are num_frames, sampling"),
    ({"fps": 2}, "has no option 'fps'"),
    ({"do_convert_rgb": False}, "do_convert_rgb must be True, got False"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options, message):
    processor = InTIClipVideoProcessor()
    for use in (lambda: InTIClipVideoProcessor(**options), lambda: processor(numbered_frames(4), **options)):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


def test_options_for_one_call_only():
    processor = InTIClipVideoProcessor(num_frames=4, size=32, crop_size=32)
    before = processor.to_dict()
    frames = numbered_frames(9)
    other = processor(frames, num_frames=2, size={"height": 40, "width": 50}, do_center_crop=False)
    assert other.pixel_values.shape == (1, 2, 3, 40, 50)
    assert processor(frames, num_frames=None).pixel_values.shape == (1, 4, 3, 32, 32)
    assert processor.to_dict() == before
    processor.num_frames = 0
    with pytest.raises(ValueError, match="num_frames"):
        processor(frames)


EVERY_OPTION = {
    "num_frames": 8, "sampling": "dense", "frame_stride": 3, "num_clips": 2, "num_crops": 3,
    "do_sample_frames": True, "do_resize": False, "size": {"shortest_edge": 20}, "resample": 2,
    "do_center_crop": True, "crop_size": {"height": 18, "width": 16},
    "do_rescale": False, "rescale_factor": 0.5,
    "do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
}  # fmt: skip


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_save_and_load(tmp_path):
    processor = InTIClipVideoProcessor(**EVERY_OPTION)
    assert {name: plain(processor.to_dict()[name]) for name in EVERY_OPTION} == EVERY_OPTION
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "video_preprocessor_config.json").exists()
    loaded = InTIClipVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert InTIClipVideoProcessor.from_pretrained(tmp_path, num_frames=5).num_frames == 5
    assert pickle.loads(pickle.dumps(loaded)).to_dict() == processor.to_dict()


def test_loads_the_file_of_an_image_processor(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": 336}, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    loaded = InTIClipVideoProcessor.from_pretrained(tmp_path)
    assert loaded.size.shortest_edge == 336 and loaded.image_mean == (0.5, 0.5, 0.5)
    assert loaded.num_frames == 16


def test_auto_class_with_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(InTIClipVideoProcessor, "_auto_class", "AutoVideoProcessor")
    InTIClipVideoProcessor(**EVERY_OPTION).save_pretrained(tmp_path / "saved")
    loaded = AutoVideoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded).__name__ == "InTIClipVideoProcessor"
    assert {name: plain(loaded.to_dict()[name]) for name in EVERY_OPTION} == EVERY_OPTION
    assert loaded(numbered_frames(30, 20, 20)).pixel_values.shape == (1, 6, 8, 3, 18, 16)


def test_in_the_pipeline(video_file):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = VideoMAEConfig(image_size=32, num_frames=4, tubelet_size=2, num_labels=3, **sizes)
    model = VideoMAEForVideoClassification(config)
    processor = InTIClipVideoProcessor(size=32, crop_size=32)
    classify = pipeline("video-classification", model, video_processor=processor)
    assert len(classify(str(video_file))) == 3


def test_without_pyav_and_torchvision():
    code = """
import sys
sys.modules["av"] = sys.modules["torchvision"] = None
import numpy
from hf_inti.model.video_processing_inti_clip import InTIClipVideoProcessor
pixel_values = InTIClipVideoProcessor()(numpy.zeros((3, 40, 30, 3), numpy.uint8)).pixel_values
assert pixel_values.shape == (1, 16, 3, 224, 224)
"""
    status, _, error = run_in_a_fork(code, cwd=Path(__file__).parents[1])
    assert status == 0, error
