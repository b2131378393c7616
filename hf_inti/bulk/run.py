"""A bulk run: what the output lacks is computed and added to it."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing

from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.unlabelled import Clip
from ..hub.metadata import fingerprint
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .decoding import ClipDecoder
from .engine import Plan, Stage, run_stages
from .model import ClipModel, Result
from .shards import Shards


SAVE_SECONDS = 300  # results that arrive as long after the last were saved are written at once


def settings_of(model: PreTrainedModel, processor: InTIClipVideoProcessor, result: Result) -> dict:
    """What all shards of a folder have in common, for their metadata."""
    return {
        "model": fingerprint(model),
        "processor": hashlib.sha256(processor.to_json_string().encode()).hexdigest(),
        **result._asdict(),
        "labels": list(result.labels),
    }


def stages_of(
    model: PreTrainedModel, processor: InTIClipVideoProcessor, result: Result, plan: Plan
) -> tuple[Stage, Stage]:
    """The decoder and the model."""
    decoder = Stage(ClipDecoder, (processor, result))
    return decoder, Stage(ClipModel, (model, processor, result, plan.threads))


def retry_broken(shards: Shards, clips: Sequence[Clip]) -> None:
    """Have `fill` try the broken ones again, and forget what was wrong with the tar shards they are in."""
    shards.forget_broken({name for clip in clips for name in (clip.video, clip.path)})


def fill(shards: Shards, clips: Sequence[Clip], stages: tuple[Stage, Stage], plan: Plan) -> None:
    """Compute the clips that `shards` lack."""
    todo = [clip for clip in clips if clip.video not in shards.done]
    saved, broken = time.monotonic(), 0
    bar = tqdm(total=len(clips), initial=len(clips) - len(todo), desc="Videos", unit="video", smoothing=0.05)
    with bar, closing(run_stages(todo, *stages, plan)) as tables:
        for table in tables:
            shards.add(table)
            broken += len(table) - table["error"].null_count
            bar.set_postfix(broken=broken, refresh=False)
            bar.update(len(table))
            if time.monotonic() - saved > SAVE_SECONDS:
                shards.flush()
                saved = time.monotonic()
