"""Fine-tune CLIP with a compression and an adaptation, or another video model, on a video dataset.

    python scripts/train.py scripts/recipes/k400_inti_b16.yaml --train_dir k400/train.csv --eval_dir k400/val.csv
    python scripts/train.py --host torchvision/mvit_v1_b --compression stts --train_dir k400/train.csv --output_dir out

The first argument is a recipe (YAML). Every flag below may also be set in the recipe; flags given here win. To train
on several GPUs or machines, start it with `accelerate launch` or `torchrun`. It writes to output_dir: best/ and last/
(model, processor and configuration, for from_pretrained), metrics.jsonl, run.json (settings and versions),
bad_videos.json, and checkpoints/, from which --resume continues.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from signal import Signals

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_inti import InTIClipVideoProcessor
from hf_inti.data.augmentation import BatchMixing
from hf_inti.data.clips import stable_hash
from hf_inti.data.datasets import label_names_of
from hf_inti.hub.push import check_repo_id, check_token, push_model
from hf_inti.training.arguments import DataArguments, ModelArguments, TrainingArguments
from hf_inti.training.cli import parse_recipe, run_script
from hf_inti.training.evaluation import end_processes, evaluate_loader, evaluation_loader
from hf_inti.training.files import check_writable, writing
from hf_inti.training.hosts import set_progress
from hf_inti.training.run_info import describe_run
from hf_inti.training.setup import (
    batches_of_all,
    build_clips,
    build_model,
    build_optimizer,
    build_processor,
    count_steps,
    load_datasets,
    training_loader,
)
from hf_inti.training.state import TrainingState, find_checkpoint


def main() -> int:
    model_args, data, training = parse_recipe([ModelArguments, DataArguments, TrainingArguments], description=__doc__)
    check_settings(model_args, data, training)
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        log_with=training.report_to,
        project_dir=training.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=training.seed),
    )
    set_seed(training.seed)
    disable_progress_bar()  # transformers' own, for loading and saving weights
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # it tidies up what a killed run left
        checkpoint = find_checkpoint(output_dir, training.resume)
    check_writable(output_dir)

    train_set, eval_set = load_datasets(data, accelerator)
    label_names = label_names_of(train_set)
    model = build_model(model_args, label_names)
    processor = build_processor(model_args.checkpoint, model.config, data)
    train_clips, eval_clips = build_clips(data, training, processor, train_set, eval_set, accelerator)
    loader, eval_loader = training_loader(train_clips, data, training, accelerator), None
    if eval_clips:
        eval_loader = evaluation_loader(eval_clips, accelerator, training.eval_batch_size, data.num_workers)
    steps_per_epoch, total_steps = count_steps(loader, data, training)
    optimizer, scheduler = build_optimizer(model, training, steps_per_epoch, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    state = TrainingState(output_dir, accelerator, model, scheduler, total_steps, training.ema_decay)
    run = describe_run(
        model_args,
        data,
        training,
        config=state.unwrapped_model.config.to_dict(),
        base_model=model_args.base_model,
        num_processes=accelerator.num_processes,
        train_fingerprint=getattr(train_set, "_fingerprint", None),
        eval_fingerprint=getattr(eval_set, "_fingerprint", None),
    )
    state.start(run, checkpoint)
    accelerator.init_trackers("hf_inti", config=None)
    mixing = BatchMixing(
        num_classes=len(label_names),
        mixup_alpha=data.mixup_alpha,
        cutmix_alpha=data.cutmix_alpha,
        label_smoothing=data.label_smoothing,
    )
    with state.interruption:
        finished = train(state, loader, eval_loader, optimizer, processor, mixing, training)
    if not finished:
        return leave(state)
    finish(state, processor, training)
    return 0


def check_settings(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Raise a ValueError for what would otherwise fail late, a push after days of training."""
    if data.streaming and training.max_steps is None:
        raise ValueError("max_steps must be given with streaming, got none; the length of a stream is not known.")
    trackers = ["all", *map(str, get_available_trackers())]
    if training.report_to not in (None, *trackers):
        raise ValueError(
            f"report_to must be one of the installed trackers ({', '.join(trackers)}), got {training.report_to!r}; "
            "install it or leave it out."
        )
    if training.push_to_hub is not None:
        if model.host is not None:
            raise ValueError(
                f"push_to_hub must be left out with a host, got {training.push_to_hub!r}; push last/ yourself."
            )
        check_repo_id(training.push_to_hub)
        check_token()


def train(
    state: TrainingState,
    loader: DataLoader,
    eval_loader: DataLoader | None,
    optimizer: Optimizer,
    processor: InTIClipVideoProcessor,
    mixing: BatchMixing,
    training: TrainingArguments,
) -> bool:
    """Train from where `state` is to its last step, with evaluations and checkpoints on the way.

    A signal ends it earlier, after the current step or batch of an evaluation, with a checkpoint: it returns False.
    """
    accelerator, model = state.accelerator, state.model
    hidden = not accelerator.is_local_main_process
    bar = tqdm(total=state.total_steps, initial=state.step, desc="Training", unit="step", disable=hidden)
    max_norm = math.inf if training.max_grad_norm is None else training.max_grad_norm
    losses, videos = [], []  # of the batches of the current step, which may have begun at the end of a stream
    if not evaluate_if_due(state, eval_loader, processor, training):  # an epoch's checkpoint is written before
        return False
    while not state.done:
        model.train()
        for batch in remaining_batches(loader, state):
            state.batches += 1
            state.bad.add(batch["bad"])
            set_progress(state.unwrapped_model, state.step / state.total_steps)
            pixel_values, targets = prepare_batch(batch, state, processor, mixing, training.seed)
            with accelerator.accumulate(model):
                loss = cross_entropy(model(pixel_values).logits.float(), targets)
                accelerator.backward(loss)
                losses.append(loss.detach())
                videos += batch["video_ids"]
                if not accelerator.sync_gradients:  # the next batch adds to the same step
                    continue
                if state.end_step(losses, videos, training.max_skipped_steps):
                    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                    if state.check_gradients(norm, videos, training.max_skipped_steps):
                        optimizer.step()
                optimizer.zero_grad()
            losses, videos = [], []
            state.finish_step()
            bar.update()
            if state.done or due(training.log_every_steps, state.step):
                state.record_losses()
            if state.done:
                break
            if state.stopped_by or due(training.checkpoint_every_steps, state.step):
                state.save()
            if state.stopped_by:
                bar.close()
                return False
        end_of_epoch(state, loader, training)
        if not evaluate_if_due(state, eval_loader, processor, training):
            bar.close()
            return False
    bar.close()
    return True


def remaining_batches(loader: DataLoader, state: TrainingState) -> Iterable[dict]:
    """The batches of the current epoch without those that are finished."""
    accelerator = state.accelerator
    loader.dataset.set_epoch(state.epoch)
    if not is_stream(loader):
        loader.set_epoch(state.epoch)
    batches = accelerator.skip_first_batches(loader, state.batches) if state.batches else loader
    return batches_of_all(batches, accelerator) if is_stream(loader) and accelerator.num_processes > 1 else batches


def prepare_batch(
    batch: dict, state: TrainingState, processor: InTIClipVideoProcessor, mixing: BatchMixing, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised and mixed `pixel_values` (B, T, 3, H, W) and their targets, and torch seeded for this batch.

    What mixing and dropout draw depends only on the batch's place in the run, so that a resumed run draws the same.
    """
    accelerator = state.accelerator
    batch_seed = stable_hash(repr((seed, state.epoch, state.batches, accelerator.process_index)))
    torch.manual_seed(batch_seed)
    pixel_values = processor.rescale_and_normalize(batch["frames"].to(accelerator.device))
    labels = batch["labels"].to(accelerator.device)
    return mixing(pixel_values, labels, torch.Generator().manual_seed(batch_seed))


def end_of_epoch(state: TrainingState, loader: DataLoader, training: TrainingArguments) -> None:
    """Count the epoch and save a checkpoint where one is due; training may have ended in the middle of the epoch."""
    if state.batches == 0:
        raise ValueError(
            f"every process must get a batch of readable videos, got none in epoch {state.epoch}; add videos to "
            "train_dir, or start fewer processes."
        )
    whole = is_stream(loader) or state.batches == len(loader)
    if whole:
        state.epoch, state.batches = state.epoch + 1, 0
    if whole and due(training.checkpoint_every_epochs, state.epoch) and between_steps(state):
        state.save()  # before the evaluation, which may take longer than a scheduler waits


def evaluate_if_due(
    state: TrainingState, eval_loader: DataLoader | None, processor: InTIClipVideoProcessor, training: TrainingArguments
) -> bool:
    """Evaluate at the end of an epoch or of training; False, and a checkpoint, after a signal.

    Records the metrics, and saves the model as best/ if its top-1 is the highest so far.
    """
    between_epochs = state.epoch > 0 and state.batches == 0
    if eval_loader is None or not (state.done or (between_epochs and due(training.eval_every_epochs, state.epoch))):
        return True
    stopped = state.hear_signal if between_steps(state) else lambda: False
    found = evaluate_loader(state.evaluated_model, eval_loader, state.accelerator, stopped)
    if found is None:
        state.save()
        return False
    metrics, _, unreadable = found
    state.bad.add(unreadable.reasons)
    names = ("top1", "top5", "mean_class_accuracy", "num_unreadable")
    state.record(**{f"eval_{name}": metrics[name] for name in names})
    if state.accelerator.is_main_process:
        tqdm.write(f"epoch {state.epoch}: top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%}")
    if metrics["top1"] > state.best:
        state.best = metrics["top1"]
        state.save_model("best", processor)
    return True


def between_steps(state: TrainingState) -> bool:
    """A stream may end between the batches of one step: no checkpoint holds half-accumulated gradients."""
    return state.accelerator.sync_gradients


def finish(state: TrainingState, processor: InTIClipVideoProcessor, training: TrainingArguments) -> None:
    """Save the model as last/, report broken videos, and push the model if asked to."""
    accelerator, output_dir = state.accelerator, state.output_dir
    state.save_model("last", processor)
    state.gather_bad_videos()
    evaluated = state.best >= 0
    if accelerator.is_main_process:
        with writing(output_dir / "bad_videos.json", "make room, then go on with --resume."):
            (output_dir / "bad_videos.json").write_text(state.bad.to_json() + "\n")
        if len(state.bad):
            print(state.bad.report())
        if state.skipped:
            print(f"{state.skipped} steps were skipped, because their loss or gradients were not finite.")
        best = f", the best (top-1 {state.best:.1%}) in {output_dir / 'best'}" if evaluated else ""
        print(f"Trained {state.step} steps; the model is in {output_dir / 'last'}{best}.")
    end_processes(accelerator)
    if training.push_to_hub is not None and accelerator.is_main_process:  # the others need not wait for it
        push_model(output_dir / ("best" if evaluated else "last"), training.push_to_hub, private=training.hub_private)


def leave(state: TrainingState) -> int:
    """The exit status of a run that a signal ended, which schedulers expect: 143 for SIGTERM, 130 for Ctrl-C."""
    if state.accelerator.is_main_process:
        name = Signals(state.stopped_by).name
        tqdm.write(f"Stopped by {name} after step {state.step}; the same command with --resume true continues.")
    end_processes(state.accelerator)
    return 128 + state.stopped_by


def due(every: int | None, count: int) -> bool:
    return bool(every) and count % every == 0


def is_stream(loader: DataLoader) -> bool:
    return isinstance(loader.dataset, IterableDataset)


if __name__ == "__main__":
    run_script(main)
