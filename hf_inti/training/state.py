"""Where a training run is: its progress, and the files in its output folder from which it resumes."""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.clips import BadVideos
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .run_info import check_same_run


COUNTERS = ("epoch", "batches", "step", "best")


class TrainingState:
    """A run's progress and everything else that a resumed run needs: `save` writes it, `start` restores it.

    Accelerate saves the model, the optimizer and the random states; `TrainingState` adds the scheduler, the moving
    average of the weights (EMA), the broken videos, the losses not yet logged and the length of metrics.jsonl. Every
    process must call every method.

    Attributes:
        epoch, batches: epochs finished, and batches finished in the current one.
        step: optimizer steps taken.
        best: highest top-1 of all evaluations so far, -1 before the first.
        losses: one detached scalar per batch since the losses were last logged.
        bad: broken videos seen by this process.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        model: nn.Module,
        scheduler: LRScheduler,
        total_steps: int,
        ema_decay: float | None = None,
    ):
        """`model`: as prepared by `accelerator`; `scheduler`: not prepared, stepped by `finish_step`."""
        self.output_dir, self.run_file = output_dir, output_dir / "run.json"
        self.accelerator, self.model, self.scheduler = accelerator, model, scheduler
        self.total_steps = total_steps
        self.ema = None
        if ema_decay is not None:
            self.ema = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.epoch, self.batches, self.step, self.best = 0, 0, 0, -1.0
        self.losses: list[torch.Tensor] = []
        self.bad = BadVideos()
        self.log: MetricsLog | None = None  # set by `start`, in the main process only

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    @property
    def unwrapped_model(self) -> InTIClipForVideoClassification:
        """The model being trained, without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def evaluated_model(self) -> nn.Module:
        """The moving average of the weights where one is kept, else the model being trained."""
        return self.model if self.ema is None else self.ema.module

    def start(self, run: dict, checkpoint: Path | None) -> None:
        """Begin the run that `describe_run` gave, or resume it from `checkpoint`, and write run.json.

        Raises ValueError if the checkpoint belongs to a run with other settings.
        """
        metrics_size = 0
        if checkpoint is not None:
            check_same_run(json.loads(self.run_file.read_text()), run)
            metrics_size = self._load(checkpoint)
        self.accelerator.wait_for_everyone()  # until all have read run.json
        if self.accelerator.is_main_process:
            self.log = MetricsLog(self.output_dir / "metrics.jsonl", metrics_size)
            part = self.run_file.with_name("run.json.part")
            part.write_text(json.dumps({**run, "resumed_at_step": self.step}, indent=2) + "\n")
            os.replace(part, self.run_file)

    def _load(self, checkpoint: Path) -> int:
        """Restore what `save` wrote; returns the size of metrics.jsonl at that time, in bytes."""
        self.accelerator.load_state(str(checkpoint))
        progress = json.loads((checkpoint / "progress.json").read_text())
        for name in COUNTERS:
            setattr(self, name, progress[name])
        self.scheduler.load_state_dict(progress["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(load_file(checkpoint / "ema.safetensors", device=str(self.accelerator.device)))
        self.bad.add(progress["bad"])
        self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in progress["losses"]]
        return progress["metrics_size"]

    def save(self) -> None:
        """Write checkpoints/step_N and delete older ones; if interrupted, a complete one remains."""
        self.gather_bad_videos()
        if self.losses:  # the mean over processes: all of them load the same file
            self.losses = list(self.accelerator.reduce(torch.stack(self.losses), "mean").unbind())
        target = self.output_dir / "checkpoints" / f"step_{self.step}"
        part = target.with_name(f"{target.name}.part")
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()  # each process writes its own random states
        if self.accelerator.is_main_process:
            progress = {name: getattr(self, name) for name in COUNTERS}
            progress["bad"] = self.bad.reasons
            progress["losses"] = [loss.item() for loss in self.losses]
            progress["metrics_size"] = self.log.size
            # As JSON: Accelerate would pickle a registered scheduler and unpickle it without `weights_only`.
            progress["scheduler"] = self.scheduler.state_dict()
            (part / "progress.json").write_text(json.dumps(progress))
            if self.ema is not None:
                save_file(self.ema.state_dict(), part / "ema.safetensors")
            replace_folder(part, target)
            for other in target.parent.iterdir():
                if other != target:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def finish_step(self) -> None:
        """Update the learning rate and the moving average after the optimizer's step."""
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 skips steps whose gradients overflow
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.unwrapped_model)
        self.step += 1

    def record(self, **values: object) -> None:
        """Write values of the current step to metrics.jsonl; numbers go to the trackers too."""
        if self.accelerator.is_main_process:
            self.log.write(step=self.step, epoch=self.epoch, **values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.step)

    def record_losses(self) -> None:
        """Record the mean loss of all batches since the last call. Raises ValueError if it is not finite."""
        mean = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        self.losses.clear()
        if not math.isfinite(mean):
            fix = "lower learning_rate, or use bf16 instead of fp16"
            raise ValueError(f"the loss must be finite, got {mean} at step {self.step}; {fix}.")
        self.record(loss=mean, learning_rate=self.scheduler.get_last_lr()[0])

    def gather_bad_videos(self) -> None:
        """Make `bad` the broken videos of all processes."""
        for reasons in gather_object([self.bad.reasons]):
            self.bad.add(reasons)

    def save_model(self, name: str, processor: InTIClipVideoProcessor) -> None:
        """Write `evaluated_model`, the processor and run.json to the folder `name`, replaced as a whole."""
        weights = self.accelerator.get_state_dict(self.model) if self.ema is None else self.ema.module.state_dict()
        if self.accelerator.is_main_process:
            part = self.output_dir / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            model = self.unwrapped_model if self.ema is None else self.ema.module
            model.save_pretrained(part, state_dict=weights)
            processor.save_pretrained(part)
            shutil.copy(self.run_file, part)
            replace_folder(part, self.output_dir / name)
        self.accelerator.wait_for_everyone()


class MetricsLog:
    """Metrics as JSON lines. A resumed run drops those written after its checkpoint and writes them again."""

    def __init__(self, path: Path, size: int = 0):
        """Opens `path` cut to its first `size` bytes."""
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self.path = path

    def write(self, **values: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size


def replace_folder(finished: Path, target: Path) -> None:
    """Move the folder `finished` to `target`; if interrupted, either the old or the new one is still complete."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(finished, target)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint from which a run in `output_dir` continues; None where it starts from the beginning.

    Raises ValueError if the folder already holds a run that is not to be resumed.
    """
    if (output_dir / "run.json").exists() and not resume:
        raise ValueError(
            f"output_dir must be a folder without a run, got {output_dir}; resume that run with --resume, or choose "
            "another folder."
        )
    return newest_checkpoint(output_dir)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps (step_N; unfinished ones end in .part or .old)."""
    found = [p for p in (output_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)
