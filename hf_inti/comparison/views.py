"""The table's accuracies in several views of each video, as papers report them, and in other orders of frames."""

from itertools import product
from pathlib import Path

from ..measure.jobs import Job, read_json, run_jobs, write_json
from ..training.arguments import DataArguments


def evaluate_views(runs: list, script: Path, views: dict, orders: list[str], jobs: int, threads: int) -> None:
    """Evaluate every run in `views` (num_clips, num_crops) of each video and in `orders` of frames, by `script`.

    That is evaluate.py. The results go into the run's record, as `views` the original order's, as `orders` the others';
    records that have them stay as they are. Raises ValueError for a record without them whose model is gone.
    """
    todo = {}
    for run, order in product(runs, orders):
        if accuracy_in(read_json(run.record), views, order) is not None:
            continue
        if not (run.folder / "last").exists():
            frames = "" if order == "original" else f" of {order} frames"
            raise ValueError(
                f"{run}: its record has no evaluation of {views['num_clips']} clips and {views['num_crops']} crops"
                f"{frames}, and its model is not in {run.folder}; ask for the evaluations that it has, or remove "
                f"{run.record} to train it again."
            )
        name = f"views_{views['num_clips']}x{views['num_crops']}"
        todo[run.folder / (name if order == "original" else f"{name}_{order}") / "results.json"] = run, order

    def keep(job: Job, seconds: float) -> str:
        (run, order), found = todo[job.output], read_json(job.output)
        record = read_json(run.record)
        if order == "original":
            record["views"] = {**views, "eval_top1": found["top1"], "eval_num_videos": found["num_videos"]}
            write_json(run.record, record)
            return f"{run}: top-1 {found['top1']:.1%} in all views"
        others = record.get("orders", {})
        record["orders"] = {**views, **(others if seen_in(others, views) else {}), order: found["top1"]}
        write_json(run.record, record)
        return f"{run}: top-1 {found['top1']:.1%} of {order} frames"

    begun = []
    for output, (run, order) in todo.items():
        output.unlink(missing_ok=True)  # of another model, or of an evaluation that was stopped before it was kept
        flags = places_of(run.parsed[1]) | {"output_dir": output.parent, **views, "frame_order": order}
        arguments = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        begun.append(Job(str(run), [str(script), str(run.folder / "last"), *arguments], run.folder / "log.txt", output))
    run_jobs(begun, jobs, threads, "Evaluating", keep)


def seen_in(evaluation: dict, views: dict) -> bool:
    """Whether it is one in these views."""
    return all(evaluation.get(name) == value for name, value in views.items())


def accuracy_in(record: dict, views: dict, order: str) -> float | None:
    """What a record says of these views and this order, if it does."""
    part, name = ("views", "eval_top1") if order == "original" else ("orders", order)
    evaluation = record.get(part, {})
    return evaluation.get(name) if seen_in(evaluation, views) else None


def places_of(data: DataArguments) -> dict[str, str | bool | None]:
    """Where evaluate.py finds the videos, by the names of its arguments."""
    shared = {name: getattr(data, name) for name in ("layout", "video_root", "allow_outside_root")}
    return {"data_dir": data.eval_dir, "split": data.eval_split, **shared}
