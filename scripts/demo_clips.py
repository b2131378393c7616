"""Reads the clips of the demo page, in a process of its own: one that crashes or fills it costs the page nothing.

demo_app.py starts it and talks to it over pipes, with limits of time and memory (hf_inti.hub.handler.Decoder).
"""

import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import av
import torch


sys.path.append(str(Path(__file__).parent))  # in a Space, hf_inti lies there

from hf_inti import InTIClipVideoProcessor, VideoDecodingError  # noqa: E402
from hf_inti.hub.handler import answer_requests  # noqa: E402
from hf_inti.model.video_decoding import CONTAINERS, VideoReader  # noqa: E402


# No protocol but the file in hand, for playlists would read others; odd metadata is no reason to refuse a video.
OPENING = {"metadata_errors": "ignore", "options": {"protocol_whitelist": "", "format_whitelist": CONTAINERS}}


def open_clip(body: bytes, name: str, max_seconds: float, max_pixels: int) -> io.BytesIO:
    """The file in memory, with its own name: so no message of the decoder tells where on the server it lies.

    Raises VideoDecodingError for what is no video, and for more pixels or seconds than that.
    """
    file, seconds, pixels = io.BytesIO(body), 0, 0
    file.name = name
    with suppress(Exception), av.open(file, **OPENING) as container:  # headers may be wrong, but cost nothing to read
        sizes = [stream.width * stream.height for stream in container.streams.video if stream.codec_context]
        seconds, pixels = (container.duration or 0) / av.time_base, max(sizes, default=0)
    if pixels > max_pixels:
        raise VideoDecodingError(f"{name}: frames of {pixels} pixels, at most {max_pixels} are taken (scale it)")
    if seconds <= max_seconds:
        seconds = VideoReader(file).duration
    if seconds > max_seconds:
        raise VideoDecodingError(f"{name}: {seconds:.0f} s long, at most {max_seconds:g} s are taken (cut it)")
    return file


def load_reader(options: str) -> Callable[..., torch.Tensor]:
    """For `answer_requests`: what a processor with these options, as JSON, sees of a clip, (1, T, 3, H, W) to 255."""
    processor = InTIClipVideoProcessor.from_dict(json.loads(options))

    def read(body: bytes, **limits: object) -> torch.Tensor:
        views = {"num_clips": 1, "num_crops": 1}
        return processor(open_clip(body, **limits), **views, do_rescale=False, do_normalize=False)["pixel_values"]

    return read


if __name__ == "__main__":
    answer_requests(partial(load_reader, sys.argv[1]))
