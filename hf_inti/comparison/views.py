"""The table's accuracies in several views of each video, as papers report them."""

from pathlib import Path

from ..measure.jobs import Job, read_json, run_jobs, write_json
from ..training.arguments import DataArguments


def evaluate_views(runs: list, script: Path, num_clips: int, num_crops: int, jobs: int, threads: int) -> None:
    """Evaluate every run in `num_clips` clips and `num_crops` crops of each video, by `script`, evaluate.py.

    The result goes into the run's record as `views`; records that have it stay as they are. Raises ValueError for a
    record without it whose model is gone.
    """
    wanted = {"num_clips": num_clips, "num_crops": num_crops}
    todo = {}
    for run in runs:
        views = read_json(run.record).get("views", {})
        if all(views.get(name) == value for name, value in wanted.items()):
            continue
        if not (run.folder / "last").exists():
            raise ValueError(
                f"{run}: its record has no evaluation of {num_clips} clips and {num_crops} crops, and its model is not "
                f"in {run.folder}; ask for the views that it has, or remove {run.record} to train it again."
            )
        todo[run.folder / f"views_{num_clips}x{num_crops}" / "results.json"] = run

    def keep(job: Job, seconds: float) -> str:
        run, found = todo[job.output], read_json(job.output)
        views = {**wanted, "eval_top1": found["top1"], "eval_num_videos": found["num_videos"]}
        write_json(run.record, {**read_json(run.record), "views": views})
        return f"{run}: top-1 {found['top1']:.1%} in all views"

    begun = []
    for output, run in todo.items():
        output.unlink(missing_ok=True)  # of another model, or of an evaluation that was stopped before it was kept
        flags = places_of(run.parsed[1]) | {"output_dir": output.parent, **wanted}
        arguments = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        begun.append(Job(str(run), [str(script), str(run.folder / "last"), *arguments], run.folder / "log.txt", output))
    run_jobs(begun, jobs, threads, "Evaluating", keep)


def places_of(data: DataArguments) -> dict[str, str | bool | None]:
    """Where evaluate.py finds the videos, by the names of its arguments."""
    shared = {name: getattr(data, name) for name in ("layout", "video_root", "allow_outside_root")}
    return {"data_dir": data.eval_dir, "split": data.eval_split, **shared}
