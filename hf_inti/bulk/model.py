"""What a bulk run computes: the model on batches of decoded clips, as rows of the output."""

from contextlib import nullcontext, suppress
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from ..model.video_processing_inti_clip import InTIClipVideoProcessor


PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Result(NamedTuple):
    """What is asked for: "scores" or "features" of `size` numbers, averages over the views of a video."""

    output: str
    size: int
    labels: tuple[str, ...] = ()  # the classes, for scores
    num_clips: int = 1
    num_crops: int = 1
    mixed_precision: str = "no"

    def schema(self) -> pa.Schema:
        """Of the output: numbers and prediction are null where `error` says why."""
        columns = [("video", pa.string()), ("error", pa.string())]
        if self.output == "scores":
            columns += [("prediction", pa.string()), ("score", pa.float32())]
        return pa.schema([*columns, (self.output, pa.list_(pa.float32(), self.size))])


class ClipModel:
    """A table of `ClipDecoder`'s rows -> one of `Result.schema`, on the GPU where there is one, else with `threads`."""

    def __init__(self, model: PreTrainedModel, processor: InTIClipVideoProcessor, result: Result, threads: int):
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor, self.result = model.to(self.device).eval(), processor, result
        with suppress(ValueError, AttributeError):  # quantised layers and other models have no faster path
            self.model.optimize_for_inference()
        self.features = []  # what the classifier reads: pooler_output
        self.model.classifier.register_forward_pre_hook(lambda _, inputs: self.features.append(inputs[0]))

    def __call__(self, views: pa.Table) -> pa.Table:
        frames, good = views["frames"], [i for i, error in enumerate(views["error"].to_pylist()) if error is None]
        clips = [_tensor(frames[i].as_buffer(), views["shape"][i].as_py()) for i in good]
        found = np.full((len(views), self.result.size), np.nan, dtype=np.float32)
        if clips:
            found[good] = self.predict(clips).numpy()
        return make_table(views["video"], views["error"], found, self.result)

    def predict(self, clips: list[torch.Tensor]) -> torch.Tensor:
        """(B, size) float32 of clips, uint8 (V, T, 3, H, W). Those of one shape are computed together."""
        if len({clip.shape for clip in clips}) > 1:
            return torch.cat([self.predict([clip]) for clip in clips])
        pixel_values = self.processor.rescale_and_normalize(torch.stack(clips).to(self.device))
        dtype = PRECISIONS[self.result.mixed_precision]
        self.features.clear()
        with torch.inference_mode(), torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            logits = self.model(pixel_values.flatten(0, 1)).logits
        found = logits.float().softmax(-1) if self.result.output == "scores" else self.features[0].float()
        return found.unflatten(0, (len(clips), -1)).mean(1).cpu()


def _tensor(data: pa.Buffer, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(shape)


def make_table(videos: pa.Array, errors: pa.Array, found: np.ndarray, result: Result) -> pa.Table:
    """The rows of the output; `found` (B, size) counts only where there is no error."""
    broken = np.array([error is not None for error in errors.to_pylist()], dtype=bool)
    numbers = pa.FixedSizeListArray.from_arrays(found.ravel(), result.size, mask=pa.array(broken))
    columns = {"video": videos, "error": errors, result.output: numbers}
    if result.output == "scores":
        best = np.nan_to_num(found).argmax(1)
        columns["prediction"] = pa.array(np.array(result.labels, dtype=object)[best], mask=broken)
        columns["score"] = pa.array(found[np.arange(len(best)), best], mask=broken)
    schema = result.schema()
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)
