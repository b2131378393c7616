"""Where a training run is: its progress, and the files in its output folder from which it resumes."""

import json
import math
import os
import shutil
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.clips import BadVideos
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .files import cause_of, recover_folder, replace_folder, writing
from .interruption import Interruption
from .run_info import check_same_run, same_videos


SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
COUNTERS = ("epoch", "batches", "step", "best", "skipped")


class TrainingState:
    """A run's progress and everything else that a resumed run needs: `save` writes it, `start` restores it.

    Accelerate saves the model, the optimizer and the random states; `TrainingState` adds the scheduler, the moving
    average of the weights (EMA), the broken videos, the losses not yet logged and the length of metrics.jsonl. Every
    process must call every method.

    Attributes:
        epoch, batches: epochs finished, and batches finished in the current one.
        step: optimizer steps taken.
        best: highest top-1 of all evaluations so far, -1 before the first.
        skipped: steps without an update, because the loss or the gradients were not finite.
        losses: one detached scalar per batch since the losses were last logged.
        bad: broken videos seen by this process.
        stopped_by: the signal that ends the run, 0 while it goes on: the same in every process.
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
            if accelerator.distributed_type in SHARDING:
                name = accelerator.distributed_type.value
                raise ValueError(f"ema_decay must be left out with {name}, which splits the weights, got {ema_decay}.")
            self.ema = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.epoch, self.batches, self.step, self.best, self.skipped = 0, 0, 0, -1.0, 0
        self.interruption, self.stopped_by = Interruption(), 0
        self.losses: list[torch.Tensor] = []
        self.bad = BadVideos()
        accelerator.register_save_state_pre_hook(_drop_prefixes)
        accelerator.register_load_state_pre_hook(self._unwrap)
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
            before = json.loads(self.run_file.read_text())
            check_same_run(before, run)
            metrics_size = self._load(checkpoint)
            self.batches = same_videos(self.batches, before, run)
        self.accelerator.wait_for_everyone()  # until all have read run.json
        if self.accelerator.is_main_process:
            self.log = MetricsLog(self.output_dir / "metrics.jsonl", metrics_size)
            part = self.run_file.with_name("run.json.part")
            with writing(part, "make room, then start it again."):
                part.write_text(json.dumps({**run, "resumed_at_step": self.step}, indent=2) + "\n")
                os.replace(part, self.run_file)

    def _load(self, checkpoint: Path) -> int:
        """Restore what `save` wrote; returns the size of metrics.jsonl at that time, in bytes."""
        try:
            self.accelerator.load_state(str(checkpoint))
            progress = json.loads((checkpoint / "progress.json").read_text())
        except (OSError, RuntimeError, SafetensorError, CheckpointException, json.JSONDecodeError) as error:
            raise ValueError(
                f"{checkpoint} must be a whole checkpoint, got {cause_of(error)}; restore its files, or delete it to "
                "start again."
            ) from error
        for name in COUNTERS:
            setattr(self, name, progress.get(name, 0))
        self.accelerator.step = 0  # its count of batches towards a step; checkpoints are written between steps
        self.scheduler.load_state_dict(progress["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(load_file(checkpoint / "ema.safetensors", device=str(self.accelerator.device)))
        self.bad.add(progress["bad"])
        self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in progress["losses"]]
        return progress["metrics_size"]

    def save(self) -> None:
        """Write checkpoints/step_N and delete older ones; if interrupted, a complete one remains.

        Raises ValueError if it cannot be written, or if the weights are not finite.
        """
        self._check_weights()
        self.gather_bad_videos()
        if self.losses:  # the mean over processes: all of them load the same file
            self.losses = list(self.accelerator.reduce(torch.stack(self.losses), "mean").unbind())
        target = self.output_dir / "checkpoints" / f"step_{self.step}"
        part = target.with_name(f"{target.name}.part")
        before = newest_checkpoint(self.output_dir) or "the start"
        with writing(part, f"make room, then go on with --resume from {before}."):
            self.accelerator.save_state(str(part))
            self.accelerator.wait_for_everyone()  # each process writes its own random states
            if self.accelerator.is_main_process:
                self._write_progress(part)
                replace_folder(part, target)
        if self.accelerator.is_main_process:
            for other in target.parent.glob("step_*"):
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)  # one that stays is in nobody's way
        self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        """Raise a ValueError, in every process, for weights that must not replace good ones: an update may overflow."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        tensors = [tensor for model in models for tensor in chain(model.parameters(), model.buffers())]
        parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        bad = torch.tensor(float(not all(part.isfinite().all() for part in parts)), device=self.accelerator.device)
        if self.accelerator.reduce(bad, "sum").item():
            raise ValueError(
                f"the weights must be finite to be saved, got NaN or infinity after step {self.step}; lower "
                "learning_rate, or use bf16 instead of fp16. The newest checkpoint is "
                f"{newest_checkpoint(self.output_dir) or 'none'}."
            )

    def _unwrap(self, models: list[nn.Module], folder: str) -> None:
        models[:] = [self.accelerator.unwrap_model(model) for model in models]

    def _write_progress(self, folder: Path) -> None:
        """What Accelerate does not save."""
        progress = {name: getattr(self, name) for name in COUNTERS}
        progress["bad"] = self.bad.reasons
        progress["losses"] = [loss.item() for loss in self.losses]
        progress["metrics_size"] = self.log.size
        # As JSON: Accelerate would pickle a registered scheduler and unpickle it without `weights_only`.
        progress["scheduler"] = self.scheduler.state_dict()
        (folder / "progress.json").write_text(json.dumps(progress))
        if self.ema is not None:
            save_file(self.ema.state_dict(), folder / "ema.safetensors")

    def end_step(self, losses: list[torch.Tensor], videos: list[str], limit: int) -> bool:
        """Whether to update the weights, from the losses of a step's batches: not if any process's are not finite.

        Also sets `stopped_by`. Raises ValueError naming all processes' `videos` if more than `limit` steps are skipped.
        """
        self.losses += losses
        stacked = torch.stack(losses)
        bad, self.stopped_by = (~stacked.isfinite()).any(), self.interruption.signal
        if self.accelerator.num_processes > 1:  # one message of two numbers a step
            flags = torch.stack([bad.int(), bad.new_tensor(self.stopped_by, dtype=torch.int)])
            bad, self.stopped_by = self.accelerator.gather(flags[None]).amax(0).tolist()
        if not bad:
            return True
        del self.losses[-len(losses) :]
        worst = stacked[~stacked.isfinite()][:1].tolist() or ["a number that is not, in another process"]
        self._skip(f"the loss must be finite, got {worst[0]}", videos, limit)
        return False

    def check_gradients(self, norm: torch.Tensor | float | None, videos: list[str], limit: int) -> bool:
        """Whether to update the weights, from the norm of a step's gradients, which every process has the same of.

        Raises ValueError like `end_step`. With fp16 it is always true: gradients overflow while the loss scale settles,
        and the scaler skips these steps by itself.
        """
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm is None or self.accelerator.scaler is not None or math.isfinite(norm):  # None: of DeepSpeed
            return True
        self._skip(f"the norm of the gradients must be finite, got {float(norm)}", videos, limit)
        return False

    def _skip(self, problem: str, videos: list[str], limit: int) -> None:
        self.skipped += 1
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            limit = 0  # its backward pass has updated the weights already
        if self.skipped > limit:
            names = sorted({name for names in gather_object([videos]) for name in names})
            raise ValueError(
                f"{problem} at step {self.step} ({self.skipped} such steps, max_skipped_steps is {limit}) on "
                f"{', '.join(names)}; lower learning_rate, use bf16 instead of fp16, or leave these videos out."
            )

    def hear_signal(self) -> bool:
        """Whether a signal came to any process, which is then `stopped_by`; `end_step` hears it too."""
        self.stopped_by = self.interruption.signal
        if self.accelerator.num_processes > 1:
            signals = torch.tensor([self.stopped_by], device=self.accelerator.device)
            self.stopped_by = self.accelerator.gather(signals).max().item()
        return bool(self.stopped_by)

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
        """Record the mean loss of all batches since the last call, if there are any.

        Raises ValueError if it is not finite.
        """
        if not self.losses:  # all steps since then were skipped
            return
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
        """Write `evaluated_model`, the processor and run.json to the folder `name`, replaced as a whole.

        Raises ValueError if it cannot be written, or if the weights are not finite.
        """
        self._check_weights()
        weights = self.accelerator.get_state_dict(self.model) if self.ema is None else self.ema.module.state_dict()
        if self.accelerator.is_main_process:
            part = self.output_dir / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            model = self.unwrapped_model if self.ema is None else self.ema.module
            with writing(part, f"make room, then go on with --resume; {name}/ is as it was."):
                model.save_pretrained(part, state_dict=weights)
                processor.save_pretrained(part)
                shutil.copy(self.run_file, part)
                replace_folder(part, self.output_dir / name)
        self.accelerator.wait_for_everyone()


def _drop_prefixes(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    """DistributedDataParallel's, so that any number of processes can load the checkpoint."""
    for state in weights:
        consume_prefix_in_state_dict_if_present(state, "module.")


class MetricsLog:
    """Metrics as JSON lines. A resumed run drops those written after its checkpoint and writes them again."""

    def __init__(self, path: Path, size: int = 0):
        """Opens `path` cut to its first `size` bytes."""
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self.path = path

    def write(self, **values: object) -> None:
        with writing(self.path, "make room, then go on with --resume."), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size


def find_checkpoint(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint from which a run in `output_dir` continues; None where it starts from the beginning.

    Undoes what a killed run left half done. Raises ValueError if the folder already holds a run that is not to be
    resumed.
    """
    if (output_dir / "run.json").exists() and not resume:
        raise ValueError(
            f"output_dir must be a folder without a run, got {output_dir}; resume that run with --resume, or choose "
            "another folder."
        )
    for pattern in ("best", "last", "checkpoints/step_*"):
        for old in output_dir.glob(f"{pattern}.old"):
            recover_folder(old.with_suffix(""))
        for part in output_dir.glob(f"{pattern}.part"):
            shutil.rmtree(part)
    return newest_checkpoint(output_dir)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps (step_N; unfinished ones end in .part or .old)."""
    found = [p for p in (output_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)
