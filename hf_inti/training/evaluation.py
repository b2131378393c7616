"""Scores of a model on a dataset, the same from one process or many."""

import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from torch import nn
from torch.utils.data import DataLoader

from ..data.clips import BadVideos, VideoClips, collate
from ..data.datasets import label_names_of
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .interruption import ignore_signals
from .metrics import VideoAccuracy


FRAME_ORDERS = ("original", "reversed", "shuffled")
AHEAD = 8  # views that each worker may decode before they are needed; one is 10 MB in the usual shape


class EvalTransform:
    """All test views of a video: (video, generator) -> pixel_values (V, T, 3, H, W), clip-major.

    `frame_order`, one of FRAME_ORDERS, is that of the sampled frames, the same in all views. "shuffled" draws it from
    the generator, which VideoClips seeds for each video. Raises ValueError for another.
    """

    def __init__(
        self,
        processor: InTIClipVideoProcessor,
        num_clips: int = 1,
        num_crops: int = 1,
        frame_order: str = "original",
    ):
        if frame_order not in FRAME_ORDERS:
            raise ValueError(f"frame_order must be one of {', '.join(FRAME_ORDERS)}, got {frame_order!r}.")
        self.processor, self.options = processor, {"num_clips": num_clips, "num_crops": num_crops}
        self.single, self.frame_order = num_clips * num_crops == 1, frame_order

    def __call__(self, video, generator: torch.Generator | None = None) -> dict:
        pixel_values = self.processor(video, return_tensors="pt", **self.options)["pixel_values"][0]
        pixel_values = pixel_values[None] if self.single else pixel_values
        if self.frame_order == "reversed":
            pixel_values = pixel_values.flip(1)
        elif self.frame_order == "shuffled":
            pixel_values = pixel_values[:, torch.randperm(pixel_values.shape[1], generator=generator)]
        return {"pixel_values": pixel_values}

    def blank(self) -> dict:
        """Zeros of that shape, in place of a broken video."""
        views, size = self.options["num_clips"] * self.options["num_crops"], self.processor.crop_size
        return {"pixel_values": torch.zeros(views, self.processor.num_frames, 3, size["height"], size["width"])}


def predict_batches(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, description: str = "Evaluating"
) -> Iterator[dict]:
    """Batches of `collate` with logits (B, V, K) in float32 in place of the pixels, NaN for broken videos.

    `loader` has to be prepared by `accelerator`. With several processes each yields the whole batch of all of them.
    """
    model.eval()
    for batch in tqdm(loader, desc=description, leave=False):
        pixel_values = batch.pop("pixel_values")  # (B, V, T, 3, H, W)
        with torch.inference_mode():
            logits = model(pixel_values.flatten(0, 1)).logits.float().unflatten(0, pixel_values.shape[:2])
            logits = logits.masked_fill(~batch["ok"][:, None, None], float("nan"))
        tensors = {name: batch[name] for name in ("labels", "index", "ok")}
        gathered = accelerator.gather_for_metrics({"logits": logits, **tensors})
        yield {name: value.cpu() for name, value in gathered.items()} | {
            "bad": merge_bad(gather_object([batch["bad"]]))
        }


def merge_bad(parts: list[dict[str, str]]) -> dict[str, str]:
    """The broken videos of all processes, name to reason."""
    return {name: reason for part in parts for name, reason in part.items()}


def evaluation_loader(clips: VideoClips, accelerator: Accelerator, batch_size: int, num_workers: int = 0) -> DataLoader:
    """A prepared loader of `clips`, which need `on_bad_video="keep"` and `EvalTransform`."""
    loader = DataLoader(
        clips, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, worker_init_fn=ignore_signals
    )
    return accelerator.prepare_data_loader(loader)


class _Begun:
    """A DataLoader whose workers start decoding immediately, not when the first batch is asked for."""

    def __init__(self, loader: DataLoader):
        self.loader, self.first = loader, iter(loader)

    def __iter__(self) -> Iterator[dict]:
        first, self.first = self.first, None
        return iter(self.loader) if first is None else first

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


def prediction_loader(clips: VideoClips, accelerator: Accelerator, batch_size: int, num_workers: int) -> DataLoader:
    """An `evaluation_loader` whose workers have begun and keep AHEAD views ready: make it, then load the model."""
    views = clips.transform.options["num_clips"] * clips.transform.options["num_crops"]
    ahead = max(2, AHEAD // (views * batch_size)) if num_workers else None
    loader = DataLoader(
        clips, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, prefetch_factor=ahead
    )
    loader = accelerator.prepare_data_loader(loader)
    loader.base_dataloader = _Begun(loader.base_dataloader)
    return loader


def evaluate_loader(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, stopped: Callable[[], bool] = lambda: False
) -> tuple[dict, dict, BadVideos] | None:
    """Evaluate on all clips of an `evaluation_loader`.

    Returns the metrics of `VideoAccuracy`, a dict of index (N,), labels (N,), ok (N,) and logits (N, V, K) in the
    dataset's order, and the `BadVideos`, the same in every process. None if `stopped()`, asked after each batch.
    """
    bad, parts = BadVideos(), []
    for batch in predict_batches(model, loader, accelerator):
        if stopped():
            return None
        bad.add(batch.pop("bad"))
        parts.append(batch)
    result = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = result["index"].argsort(stable=True)
    result = {name: value[order] for name, value in result.items()}
    views = result["logits"].shape[1]
    metric = VideoAccuracy()
    metric.add_batch(
        predictions=result["logits"].flatten(0, 1).numpy(),
        references=result["labels"].repeat_interleave(views).numpy(),
        video_ids=result["index"].repeat_interleave(views).numpy(),
    )
    return metric.compute(label_names=label_names_of(loader.dataset.dataset)), result, bad


def end_processes(accelerator: Accelerator) -> None:
    """Finish trackers and the process group; to be called by all processes at their end."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # Gloo's threads need Python's lock to release the last tensors. If the group is destroyed first, it holds that
        # lock and waits for them forever.
        time.sleep(0.5)
    accelerator.end_training()
