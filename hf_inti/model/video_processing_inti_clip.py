"""Videos to pixel values: sample frames, resize, crop, rescale, normalise.

The spatial part is CLIP's preprocessing (`transformers.CLIPImageProcessor`) on uint8 frames, in torch. It does not need
torchvision, and needs PyAV only to decode files.

B videos, V views (clips x crops), T frames, H and W pixels.
"""

import io
import os
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict, is_pil_image
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_numpy_array
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import httpx  # transformers' HTTP client, whichever module it is

from .video_decoding import VideoDecodingError, VideoReader


SAMPLINGS = ("uniform", "dense")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as in processor files
OPTIONS = (
    "num_frames", "sampling", "frame_stride", "num_clips", "num_crops", "do_sample_frames",
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
# Fixed options: config files may state them, but only with these values.
FIXED = {
    "default_to_square": False,
    "do_convert_rgb": True,
    "do_pad": False,
    "data_format": "channels_first",
    "return_metadata": False,
}
BOOKKEEPING = (
    "video_processor_type", "image_processor_type", "feature_extractor_type", "processor_class", "auto_map",
)  # fmt: skip


def sample_indices(
    total: int,
    *,
    num_frames: int,
    sampling: str = "uniform",
    frame_stride: int | None = None,
    clip: int = 0,
    num_clips: int = 1,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The indices of one clip's `num_frames` frames out of `total`, in non-decreasing order.

    "uniform" (TSN) divides the video into `num_frames` equal segments and takes one frame of each: at a random point
    with a `generator` (training), else at the fraction (clip + 1) / (num_clips + 1) of the segment, so that a single
    clip takes the middles. Short videos repeat frames.

    "dense" takes every `frame_stride`-th frame of a window of num_frames * frame_stride frames. With a `generator` the
    window starts at random, else the clips' windows are spread evenly from the start of the video to its end, a single
    one in the centre. If the video is shorter than the window, its last frame is repeated; the video is not looped, so
    that time never jumps back.

    Raises:
        ValueError: for counts that are not positive integers, a clip outside num_clips, or an unknown sampling.
    """
    _check_positive(total=total, num_frames=num_frames, num_clips=num_clips)
    if not 0 <= clip < num_clips:
        raise ValueError(f"clip must be at least 0 and less than num_clips = {num_clips}, got {clip}.")
    if sampling == "uniform":
        if generator is None:  # exact integer arithmetic
            parts = num_clips + 1
            return [(i * parts + clip + 1) * total // (num_frames * parts) for i in range(num_frames)]
        points = torch.rand(num_frames, generator=generator, dtype=torch.float64)
        points = (points + torch.arange(num_frames)) * total / num_frames
        return points.long().clamp(max=total - 1).tolist()
    if sampling == "dense":
        _check_positive(frame_stride=frame_stride)
        last_start = max(total - num_frames * frame_stride, 0)
        if generator is not None:
            start = torch.randint(last_start + 1, (), generator=generator).item()
        else:
            start = last_start // 2 if num_clips == 1 else clip * last_start // (num_clips - 1)
        return [min(start + i * frame_stride, total - 1) for i in range(num_frames)]
    raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}.")


def resize(frame: torch.Tensor, size: SizeDict, resample: int) -> torch.Tensor:
    """Resizes a uint8 frame (3, H, W) to `size`, which has shortest_edge or height and width, in pixels.

    The long side is rounded down, as in CLIP. Antialiased interpolation equals PIL's on uint8, but not on floats, which
    overshoot at edges where uint8 saturates.
    """
    height, width = frame.shape[-2:]
    if size.shortest_edge is None:
        new = (size.height, size.width)
    elif height <= width:
        new = (size.shortest_edge, int(size.shortest_edge * width / height))
    else:
        new = (int(size.shortest_edge * height / width), size.shortest_edge)
    if new == (height, width):
        return frame
    return F.interpolate(frame[None], size=new, mode=INTERPOLATIONS[resample], antialias=True)[0]


def crop(frame: torch.Tensor, height: int, width: int, place: int = 1) -> torch.Tensor:
    """Crops (..., H, W) to (..., height, width), zero-padded where the frame is smaller.

    `place` is the position along the frame's longer side: 0 for its start (left or top), 1 for the centre, 2 for its
    end. Rounds like `transformers.image_transforms.center_crop`.
    """
    full_height, full_width = frame.shape[-2:]
    pad_height, pad_width = max(height - full_height, 0), max(width - full_width, 0)
    if pad_height or pad_width:  # an odd padding has its extra pixel at the top or left
        frame = F.pad(frame, (-(-pad_width // 2), pad_width // 2, -(-pad_height // 2), pad_height // 2))
    room_height, room_width = frame.shape[-2] - height, frame.shape[-1] - width
    top, left = room_height // 2, room_width // 2
    if full_height > full_width:
        top = room_height * place // 2
    else:
        left = room_width * place // 2
    return frame[..., top : top + height, left : left + width]


class InTIClipVideoKwargs(VideosKwargs, total=False):
    sampling: str
    frame_stride: int | None
    num_clips: int
    num_crops: int


class InTIClipVideoProcessor(BaseVideoProcessor):
    """Turns videos into `pixel_values`.

    Every option is an attribute, is saved to `video_preprocessor_config.json`, and can be overridden in each call. None
    means "not given".

    Args:
        num_frames, sampling ("uniform" or "dense"), frame_stride (frames, "dense" only), num_clips: see
            `sample_indices`.
        do_sample_frames: False uses all frames of a video.
        do_resize, size, resample: the side(s) in pixels and PIL's number of the interpolation (2 bilinear, 3 bicubic);
            see `resize`.
        do_center_crop, crop_size: height and width in pixels; see `crop`.
        num_crops: 1 (centre) or 3 (also both ends of the longer side).
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: see `rescale_and_normalize`; default: CLIP's.

    Raises:
        ValueError: for an unknown option or an invalid value.
    """

    valid_kwargs = InTIClipVideoKwargs
    model_input_names = ["pixel_values"]
    default_to_square = False
    num_frames = 16
    sampling = "uniform"
    frame_stride = None
    num_clips = 1
    num_crops = 1
    do_sample_frames = True
    do_resize = True
    size = {"shortest_edge": 224}
    resample = 3
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def __init__(self, **options):
        _check_names(options)
        super().__init__(**options)
        self._options({})  # checks the values

    def preprocess(self, videos: Any, return_tensors: str | None = "pt", **overrides) -> BatchFeature:
        """The pixel values of one video or a batch; the same as calling the processor.

        Args:
            videos: one video, a list of videos, or a batch as an array or tensor with 5 axes. A video is a path, an
                http(s) URL, the bytes of a file, a binary file object, a dict {"path", "bytes"} as in `datasets` (the
                bytes are preferred), a list of frames (PIL images, or arrays or tensors with 2 or 3 axes), or an array
                or tensor (T, H, W, C) or (T, C, H, W) with C = 3, 1 (grey) or 4 (alpha is dropped). Arrays are uint8,
                or floats in [0, 1], which are rounded to uint8 first so that all kinds of input are resized alike.
            return_tensors: "pt" or "np".
            overrides: any of the processor's options, for this call only.

        Returns:
            BatchFeature with float32 `pixel_values` (B, T, 3, H, W), or, if num_clips * num_crops > 1,
            (B, V, T, 3, H, W), where view = clip * num_crops + crop.

        Raises:
            VideoDecodingError: a file or URL cannot be read; the message names it.
            ValueError: for a bad option, input shape or dtype, or videos of different shapes.
        """
        options = self._options(overrides)
        batch = [self._views(video, f"video {i}", options) for i, video in enumerate(_make_batch(videos))]
        frames = _stack(batch, "videos") if len(batch) > 1 else batch[0][None]
        pixel_values = _rescale_and_normalize(frames, options)  # (B, V, T, 3, H, W)
        if options.num_clips * options.num_crops == 1:
            pixel_values = pixel_values[:, 0]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def load_frames(
        self, video: Any, num_frames: int | None = None, generator: torch.Generator | None = None, **overrides
    ) -> torch.Tensor:
        """One clip of one video, resized but neither cropped nor normalised: uint8 (T, 3, h, w).

        Training augmentation comes next, then `rescale_and_normalize`. Frames are sampled at random with a `generator`,
        else as for a single test clip; do_sample_frames=False returns all frames. Other arguments and errors: see
        `preprocess`.
        """
        options = self._options({**overrides, "num_frames": num_frames, "num_clips": 1})

        def choose(total):
            return _choose(total, options, generator=generator)

        def transform(frame):
            return _resize(frame, options)

        return _stack(_read_frames(video, "the video", choose, transform), "frames")

    def rescale_and_normalize(self, frames: torch.Tensor, **overrides) -> torch.Tensor:
        """Rescales and normalises (..., 3, H, W), uint8 or float with values from 0 to 255; returns float32."""
        if frames.ndim < 3 or frames.shape[-3] != 3:
            raise ValueError(f"frames must have shape (..., 3, H, W), got {tuple(frames.shape)}.")
        return _rescale_and_normalize(frames, self._options(overrides))

    def _views(self, video, name, options):
        """All views of one video, uint8 (V, T, 3, H, W). Frames that views share are resized once."""
        height, width = options.crop_size.height, options.crop_size.width
        places = (0, 1, 2) if options.num_crops == 3 else (1,)

        def choose(total):
            return [i for clip in range(options.num_clips) for i in _choose(total, options, clip=clip)]

        def transform(frame):
            # Crops are views, copied by `_stack` once all frames are decoded: copying here would start torch's threads,
            # which compete with the decoder's. A view may keep a resized frame in memory, but not a full-size one.
            resized = _resize(frame, options)
            if not options.do_center_crop:
                return [resized]
            crops = [crop(resized, height, width, place) for place in places]
            return [cut.clone() for cut in crops] if resized is frame else crops

        frames = _read_frames(video, name, choose, transform)
        views = _stack([cut for crops in frames for cut in crops], "frames")
        views = views.unflatten(0, (options.num_clips, -1, len(places)))  # (clips, T, crops, 3, H, W)
        return views.transpose(1, 2).flatten(0, 1)

    def _options(self, overrides):
        """The overrides that are not None, else the attributes; all checked."""
        _check_names(overrides)
        options = {}
        for name in OPTIONS:
            value = getattr(self, name) if overrides.get(name) is None else overrides[name]
            options[name] = dict(value) if isinstance(value, SizeDict) else value
        try:
            validate_typed_dict(self.valid_kwargs, options)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error
        options = self._standardize_kwargs(**options, default_to_square=False)  # sizes become SizeDict
        options = SimpleNamespace(**options)
        _check_values(options)
        return options


def _check_names(options):
    for name, value in options.items():
        if name in OPTIONS or name in BOOKKEEPING or name.startswith("_") or value is None:
            continue
        if name not in FIXED:
            raise ValueError(f"InTIClipVideoProcessor has no option {name!r}; its options are {', '.join(OPTIONS)}.")
        if value != FIXED[name]:
            raise ValueError(f"{name} must be {FIXED[name]!r}, got {value!r}; leave it out.")


def _check_positive(**counts):
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def _check_values(options):
    _check_positive(num_frames=options.num_frames, num_clips=options.num_clips)
    if options.sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {options.sampling!r}.")
    if options.sampling == "dense":
        _check_positive(frame_stride=options.frame_stride)
    if options.num_crops not in (1, 3):
        raise ValueError(f"num_crops must be 1 or 3, got {options.num_crops!r}.")
    if options.num_crops == 3 and not options.do_center_crop:
        raise ValueError("do_center_crop must be True with num_crops = 3, got False; set num_crops = 1.")
    if options.num_clips > 1 and not options.do_sample_frames:
        raise ValueError(f"num_clips must be 1 with do_sample_frames = False, got {options.num_clips}.")
    if options.resample not in INTERPOLATIONS:
        names = ", ".join(f"{number} ({name})" for number, name in INTERPOLATIONS.items())
        raise ValueError(f"resample must be one of {names}, got {options.resample!r}.")
    size, crop_size = dict(options.size), dict(options.crop_size)
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size must have either shortest_edge or height and width, got {size}.")
    if set(crop_size) != {"height", "width"}:
        raise ValueError(f"crop_size must have height and width, got {crop_size}.")
    for name, value in (*size.items(), *crop_size.items()):
        _check_positive(**{name: value})
    mean, std = torch.tensor(options.image_mean), torch.tensor(options.image_std)
    if mean.numel() not in (1, 3) or std.numel() not in (1, 3) or 0 in std:
        got = f"{options.image_mean} and {options.image_std}"
        raise ValueError(f"image_mean and image_std must be 1 or 3 numbers, and image_std not 0, got {got}.")


def _choose(total, options, clip=0, generator=None):
    if not options.do_sample_frames:
        return list(range(total))
    return sample_indices(
        total,
        num_frames=options.num_frames,
        sampling=options.sampling,
        frame_stride=options.frame_stride,
        clip=clip,
        num_clips=options.num_clips,
        generator=generator,
    )


def _resize(frame, options):
    return resize(frame, options.size, options.resample) if options.do_resize else frame


def _rescale_and_normalize(frames, options):
    """Copies the frames only once: another copy would cost as much as the arithmetic."""
    frames = frames.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    scale = options.rescale_factor if options.do_rescale else 1.0
    if not options.do_normalize:
        return frames.mul_(scale)
    mean = torch.tensor(options.image_mean, device=frames.device).view(-1, 1, 1)
    std = torch.tensor(options.image_std, device=frames.device).view(-1, 1, 1)
    return frames.mul_(scale / std).sub_(mean / std)


def _stack(tensors, what):
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ValueError(f"{what} must have one shape to be stacked, got {shapes}; crop and sample them alike.")
    return torch.stack(tensors)


def _is_array(value):
    return is_numpy_array(value) or torch.is_tensor(value)


def _make_batch(videos):
    if _is_array(videos) and videos.ndim == 5:
        videos = list(videos)
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if len(videos) == 0:
        raise ValueError("a list of videos or frames must not be empty, got [].")
    frames = [is_pil_image(item) or (_is_array(item) and item.ndim < 4) for item in videos]
    if all(frames):
        return [videos]
    if any(frames):
        raise ValueError("a list must be either the frames of one video or videos, got a mixture.")
    return videos


def _read_frames(video, name, choose, transform):
    """The frames `choose(total)` of one video, after `transform`, which gets each as uint8 (3, H, W) once."""
    if isinstance(video, dict):
        name = video.get("path") or name
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, str) and video.lower().startswith(("http://", "https://")):
        name, video = video, _download(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        video = io.BytesIO(video)
        video.name = name  # for the decoder's error messages
    if isinstance(video, (str, os.PathLike)) or hasattr(video, "read"):
        with VideoReader(video) as reader:
            return reader.read(choose(reader.num_frames), lambda frame: transform(frame.permute(2, 0, 1)))

    if _is_array(video) and video.ndim == 4:
        axis = _channel_axis(video.shape[1:])
    elif isinstance(video, (list, tuple)):
        axis = None
    else:
        got = f"shape {tuple(video.shape)}" if _is_array(video) else type(video).__name__
        kinds = "a path, URL, bytes, file object, list of frames, (T, H, W, C) or (T, C, H, W)"
        raise ValueError(f"{name} must be {kinds}, got {got}.")
    if len(video) == 0:
        raise ValueError(f"{name} must have at least one frame, got none.")
    indices = choose(len(video))
    frames = {i: transform(_to_rgb(video[i], axis)) for i in set(indices)}
    return [frames[i] for i in indices]


def _download(url):
    try:
        return httpx.get(url, follow_redirects=True, timeout=30).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VideoDecodingError(f"{url}: cannot be downloaded: {reason} (check the address)") from error


def _channel_axis(shape):
    """0 or 2: the axis of size 3, else of size 1 or 4, of a frame with three axes."""
    for sizes in ((3,), (1, 4)):
        axes = [axis for axis in (0, 2) if shape[axis] in sizes]
        if len(axes) == 1:
            return axes[0]
        if len(axes) == 2:
            break
    raise ValueError(f"a frame must be either (H, W, C) or (C, H, W) with C = 3, 1 or 4, got {tuple(shape)}.")


def _to_rgb(frame, axis=None):
    """A PIL image, array or tensor as uint8 (3, H, W)."""
    if is_pil_image(frame):
        if frame.mode[0] in "IF" or 0 in frame.size:  # I, I;16, F: Pillow would clip values above 255
            got = f"mode {frame.mode}, {frame.width} x {frame.height}"
            raise ValueError(f"a PIL image must have 8 bits per channel and at least one pixel, got {got}.")
        data = bytearray(frame.convert("RGB").tobytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(frame.height, frame.width, 3).permute(2, 0, 1)
    if not _is_array(frame) or frame.ndim not in (2, 3):
        got = f"shape {tuple(frame.shape)}" if _is_array(frame) else type(frame).__name__
        raise ValueError(f"a frame must be a PIL image, or an array or tensor with 2 or 3 axes, got {got}.")
    if 0 in frame.shape:
        raise ValueError(f"a frame must have at least one pixel, got shape {tuple(frame.shape)}.")
    if is_numpy_array(frame):
        try:
            frame = torch.from_numpy(frame.copy())  # torch rejects read-only arrays and negative strides
        except (TypeError, ValueError):  # objects, long doubles, non-native byte order
            raise ValueError(f"frames must be uint8, or float in [0, 1], got {frame.dtype}; convert them.") from None
    if frame.ndim == 2:
        frame = frame[None]
    elif (_channel_axis(frame.shape) if axis is None else axis) == 2:
        frame = frame.permute(2, 0, 1)
    if frame.is_floating_point():
        low, high = (x.item() for x in frame.aminmax())
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise ValueError(f"float frames must lie in [0, 1], got [{low:g}, {high:g}]; divide by 255.")
        frame = (frame.float() * 255).round().to(torch.uint8)
    if frame.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, or float in [0, 1], got {frame.dtype}; convert them.")
    return frame[:3].expand(3, -1, -1)


InTIClipVideoProcessor.register_for_auto_class()  # save_pretrained also writes the code
