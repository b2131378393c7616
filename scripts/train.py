"""Fine-tune CLIP with a compression and an adaptation on a video dataset.

    python scripts/train.py scripts/recipes/k400_inti_b16.yaml --train_dir k400/train.csv --eval_dir k400/val.csv

The first argument is a recipe (YAML); every flag below can stand in it, and flags given here win. On several GPUs or
machines start it with `accelerate launch` or `torchrun`. In output_dir it leaves best/ and last/ (model, processor and
configuration, for from_pretrained), metrics.jsonl, run.json (all that was decided), bad_videos.json, and checkpoints/
from which --resume goes on.
"""

import os
import sys


# This folder comes first in the search path, where its evaluate.py would be taken for the package of that name.
sys.path = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))]

import json
import math
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed, tqdm
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from hf_inti import InTIClipVideoProcessor
from hf_inti.data.augmentation import BatchMixing
from hf_inti.data.clips import BadVideos, collate, stable_hash
from hf_inti.data.datasets import align_labels, label_names_of, load_video_dataset
from hf_inti.hub.push import check_repo_id, check_token, push_model
from hf_inti.training.arguments import DataArguments, ModelArguments, TrainingArguments
from hf_inti.training.cli import parse_recipe, run_script
from hf_inti.training.evaluation import end_processes, evaluate_loader, evaluation_loader
from hf_inti.training.setup import (
    MetricsLog,
    batches_of_all,
    build_clips,
    build_model,
    build_optimizer,
    check_same_run,
    describe_run,
    frame_size,
    newest_checkpoint,
    replace_folder,
)


def due(every: int | None, count: int) -> bool:
    return bool(every) and count % every == 0


def main() -> None:
    model_args, data, training = parse_recipe([ModelArguments, DataArguments, TrainingArguments], description=__doc__)
    if data.streaming and training.max_steps is None:
        raise ValueError("--streaming needs --max_steps: the length of a stream is not known beforehand.")
    if training.report_to not in (None, "all", *map(str, get_available_trackers())):
        raise ValueError(f"report_to names {training.report_to}, which is not installed; install it, or leave it out.")
    if training.push_to_hub is not None:  # what is wrong with it shows now, not after days
        check_repo_id(training.push_to_hub)
        check_token()
    output_dir = Path(training.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        log_with=training.report_to,
        project_dir=training.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=training.seed),
        step_scheduler_with_optimizer=False,  # the schedule counts optimiser steps, whatever the number of processes
    )
    set_seed(training.seed)
    disable_progress_bar()  # of loading and saving weights, beside ours
    output_dir.mkdir(parents=True, exist_ok=True)
    run_file = output_dir / "run.json"
    if run_file.exists() and not training.resume:
        raise ValueError(f"{output_dir} holds a run; give --resume to go on with it, or another --output_dir.")
    resume_from = newest_checkpoint(output_dir)  # none: begin

    load = partial(load_video_dataset, layout=data.layout, video_root=data.video_root)
    with accelerator.main_process_first():
        train_set = load(data.train_dir, split=data.train_split, streaming=data.streaming)
        label_names = label_names_of(train_set)
        eval_set = data.eval_dir and align_labels(load(data.eval_dir, split=data.eval_split), label_names)
    model = build_model(model_args, label_names)
    size = model.config.image_size
    given = {name: getattr(data, name) for name in ("sampling", "frame_stride", "image_mean", "image_std")}
    processor = InTIClipVideoProcessor(
        num_frames=model.config.num_frames,
        size=frame_size(size, data.squash),
        crop_size={"height": size, "width": size},
        **{name: value for name, value in given.items() if value is not None},
    )
    train_clips, eval_clips = build_clips(data, training, processor, train_set, eval_set, accelerator)
    loader = DataLoader(
        train_clips,
        batch_size=training.batch_size,
        shuffle=None if data.streaming else True,
        drop_last=not data.streaming and len(train_clips) >= training.batch_size * accelerator.num_processes,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(training.seed),  # not the global one, which the steps below seed
    )
    if not data.streaming:  # a stream is already split among the processes
        loader = accelerator.prepare_data_loader(loader)
    eval_loader = None
    if eval_clips:
        eval_loader = evaluation_loader(eval_clips, accelerator, training.eval_batch_size, data.num_workers)
    accumulate = training.gradient_accumulation_steps
    if data.streaming:  # of unknown length: max_steps stand for the recipe's epochs, of which warm-up is a share
        steps_per_epoch = training.max_steps / training.epochs
    else:
        steps_per_epoch = -(-len(loader) // accumulate)
    total_steps = training.max_steps or training.epochs * steps_per_epoch
    optimizer, scheduler = build_optimizer(model, training, steps_per_epoch, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = None
    if training.ema_decay is not None:
        ema = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(training.ema_decay))
    mixing = BatchMixing(
        num_classes=len(label_names),
        mixup_alpha=data.mixup_alpha,
        cutmix_alpha=data.cutmix_alpha,
        label_smoothing=data.label_smoothing,
    )

    run = describe_run(
        model_args,
        data,
        training,
        config=accelerator.unwrap_model(model).config.to_dict(),
        base_model=None if Path(model_args.model).exists() else model_args.model,  # its name on the Hub
        num_processes=accelerator.num_processes,
        train_fingerprint=getattr(train_set, "_fingerprint", None),
        eval_fingerprint=getattr(eval_set, "_fingerprint", None),
    )
    progress = {"epoch": 0, "batches": 0, "step": 0, "best": -1.0}  # batches: done of this epoch
    bad, losses, metrics_size = BadVideos(), [], 0  # losses: since they were last logged
    if resume_from is not None:
        check_same_run(json.loads(run_file.read_text()), run)
        accelerator.load_state(str(resume_from))
        progress = json.loads((resume_from / "progress.json").read_text())
        scheduler.load_state_dict(progress.pop("scheduler"))
        if ema is not None:
            ema.load_state_dict(load_file(resume_from / "ema.safetensors", device=str(accelerator.device)))
        bad.add(progress.pop("bad"))
        losses = [torch.tensor(loss, device=accelerator.device) for loss in progress.pop("losses")]
        metrics_size = progress.pop("metrics_size")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log = MetricsLog(output_dir / "metrics.jsonl", metrics_size)
        part = output_dir / "run.json.part"
        part.write_text(json.dumps({**run, "resumed_at_step": progress["step"]}, indent=2) + "\n")
        os.replace(part, run_file)
    accelerator.init_trackers("hf_inti", config=None)

    def record(**values) -> None:
        if accelerator.is_main_process:
            log.write(step=progress["step"], epoch=progress["epoch"], **values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        accelerator.log(numbers, step=progress["step"])

    def save_model(name: str) -> None:
        state = ema.module.state_dict() if ema is not None else accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            trained = ema.module if ema is not None else accelerator.unwrap_model(model)
            finished = output_dir / f"{name}.part"
            shutil.rmtree(finished, ignore_errors=True)
            trained.save_pretrained(finished, state_dict=state)
            processor.save_pretrained(finished)
            shutil.copy(run_file, finished)
            replace_folder(finished, output_dir / name)
        accelerator.wait_for_everyone()

    def share_bad_videos() -> None:
        for reasons in gather_object([bad.reasons]):
            bad.add([f"{name}\t{reason}" for name, reason in reasons.items()])

    def save_checkpoint() -> None:
        share_bad_videos()
        if losses:  # those of all processes, since there is one file
            losses[:] = accelerator.reduce(torch.stack(losses), "mean").unbind()
        folder = output_dir / "checkpoints"
        part = folder / f"step_{progress['step']}.part"
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()  # each process writes something of its own
        if accelerator.is_main_process:
            rest = {
                "bad": [f"{name}\t{reason}" for name, reason in bad.reasons.items()],
                "losses": [loss.item() for loss in losses],
                "metrics_size": log.size,
                # Not registered with Accelerate, which would read them back as pickles of any kind.
                "scheduler": scheduler.state_dict(),
            }
            if ema is not None:
                save_file(ema.state_dict(), part / "ema.safetensors")
            (part / "progress.json").write_text(json.dumps({**progress, **rest}))
            replace_folder(part, folder / f"step_{progress['step']}")
            for old in folder.iterdir():  # only the newest is of use
                if old.name != f"step_{progress['step']}":
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def evaluate() -> None:
        metrics, _, unreadable = evaluate_loader(ema.module if ema is not None else model, eval_loader, accelerator)
        bad.add([f"{name}\t{reason}" for name, reason in unreadable.reasons.items()])
        values = {name: metrics[name] for name in ("top1", "top5", "mean_class_accuracy", "num_unreadable")}
        record(**{f"eval_{name}": value for name, value in values.items()})
        if accelerator.is_main_process:
            bar.write(f"epoch {progress['epoch']}: top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%}")
        if metrics["top1"] > progress["best"]:
            progress["best"] = metrics["top1"]
            save_model("best")

    def log_losses() -> None:
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        losses.clear()
        if not math.isfinite(mean):
            raise ValueError(
                f"the loss is {mean} at step {progress['step']}; lower learning_rate, or use bf16, not fp16."
            )
        record(loss=mean, learning_rate=scheduler.get_last_lr()[0])

    bar = tqdm(total=total_steps, initial=progress["step"], desc="Training", unit="step")
    done = progress["step"] >= total_steps
    while not done:
        train_clips.set_epoch(progress["epoch"])
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(progress["epoch"])
        model.train()
        rest = accelerator.skip_first_batches(loader, progress["batches"]) if progress["batches"] else loader
        if data.streaming and accelerator.num_processes > 1:
            rest = batches_of_all(rest, accelerator)
        for batch in rest:
            progress["batches"] += 1
            bad.add(batch["bad"])
            # What dropout and mixing draw depends on the place in the run alone, so that a resumed run goes on as it
            # would have.
            place = (training.seed, progress["epoch"], progress["batches"], accelerator.process_index)
            place_seed = stable_hash(repr(place))
            torch.manual_seed(place_seed)
            pixel_values = processor.rescale_and_normalize(batch["pixel_values"].to(accelerator.device))
            labels = batch["labels"].to(accelerator.device)
            pixel_values, targets = mixing(pixel_values, labels, torch.Generator().manual_seed(place_seed))
            accelerator.unwrap_model(model).set_training_progress(progress["step"] / total_steps)
            with accelerator.accumulate(model):
                loss = cross_entropy(model(pixel_values=pixel_values).logits.float(), targets)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients and training.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            if ema is not None:
                ema.update_parameters(accelerator.unwrap_model(model))
            progress["step"] += 1
            bar.update()
            done = progress["step"] == total_steps
            if progress["step"] % training.log_every_steps == 0 or done:
                log_losses()
            if due(training.checkpoint_every_steps, progress["step"]) and not done:
                save_checkpoint()
            if done:
                break
        if progress["batches"] == 0:
            raise ValueError(f"{data.train_dir} gave no batch of readable videos; every process needs some.")
        if data.streaming or progress["batches"] == len(loader):
            progress["epoch"], progress["batches"] = progress["epoch"] + 1, 0
            if eval_loader and (due(training.eval_every_epochs, progress["epoch"]) or done):
                evaluate()
            # Not amid an accumulated gradient, where a stream may end: no checkpoint holds that.
            if due(training.checkpoint_every_epochs, progress["epoch"]) and accelerator.sync_gradients:
                save_checkpoint()
        elif eval_loader:  # stopped by max_steps in the middle of an epoch
            evaluate()
    bar.close()
    save_model("last")
    share_bad_videos()
    if accelerator.is_main_process:
        (output_dir / "bad_videos.json").write_text(bad.to_json() + "\n")
        if len(bad):
            print(bad.report())
        best = f", the best (top-1 {progress['best']:.1%}) in {output_dir / 'best'}" if eval_loader else ""
        print(f"Trained {progress['step']} steps; the model is in {output_dir / 'last'}{best}.")
    end_processes(accelerator)
    if training.push_to_hub is not None and accelerator.is_main_process:  # the others need not wait for it
        trained = output_dir / ("best" if eval_loader else "last")
        push_model(trained, training.push_to_hub, private=training.hub_private)


if __name__ == "__main__":
    run_script(main)
