"""Videos to frames."""

import torch

from ..hub.handler import read_video
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .model import Result


class ClipDecoder:
    """A `data.unlabelled.Clip` as a dict -> `video`, `error`, `frames` and `shape`.

    `frames` are the bytes of uint8 (V, T, 3, H, W), a quarter of the pixel values. Whatever is wrong with the video is
    its `error`, and then there are none.
    """

    def __init__(self, processor: InTIClipVideoProcessor, result: Result):
        torch.set_num_threads(1)  # other decoders use the other cores
        self.processor = processor
        self.options = {"num_clips": result.num_clips, "num_crops": result.num_crops}
        self.single = result.num_clips * result.num_crops == 1

    def __call__(self, clip: dict) -> dict:
        if clip["error"] is not None:
            return _broken(clip, clip["error"])
        try:
            video = {"path": clip["video"], "bytes": read_clip(clip)}
            frames = self.processor(video, do_rescale=False, do_normalize=False, **self.options)["pixel_values"][0]
        except Exception as error:  # one of a million clips must not stop the others
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            reason = " ".join(str(error).split()).removeprefix(f"{clip['video']}: ")
            return _broken(clip, kind + reason)
        frames = (frames[None] if self.single else frames).to(torch.uint8)
        data = frames.numpy().tobytes()
        return {"video": clip["video"], "error": None, "frames": data, "shape": list(frames.shape)}


def _broken(clip: dict, reason: str) -> dict:
    return {"video": clip["video"], "error": reason, "frames": b"", "shape": []}


def read_clip(clip: dict) -> bytes | None:
    """The bytes of a clip, None for a file. Raises ValueError for a URL that is not public and a cut shard."""
    if "://" in clip["path"]:
        return read_video(clip["path"])
    if clip["size"] < 0:
        return None
    with open(clip["path"], "rb") as shard:
        shard.seek(clip["offset"])
        data = shard.read(clip["size"])
    if len(data) < clip["size"]:
        raise ValueError(f"the shard must hold {clip['size']} bytes of it, got {len(data)}: cut off.")
    return data
