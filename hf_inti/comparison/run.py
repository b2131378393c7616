"""Compare methods: train each under one recipe with the same seeds and data, measure each, write one table.

    python scripts/compare.py methods --config scripts/recipes/compare_demo.yaml --train_dir videos/train

Every run is a process of scripts/train.py with the recipe, then the comparison's overrides, then flags of train.py
given here, then the method's own settings: the later wins. Killed or stopped, the same command continues.
output_dir gets comparison.md, .csv, .json and .png, and for every method the runs (seed_0/ ..., with log.txt).
records_dir gets a record of every finished run (METHOD/seed_0.json: settings, accuracy by epoch and in all views,
seconds, command, commit, machine) and the measurements. Runs whose record exists are not repeated, so that a long
comparison can be committed and continued elsewhere.

    python scripts/compare.py methods --config COMPARISON.yaml --train_dir videos --group '^([FM][0-9]+)_'

cross-validates: each group, such as a speaker, is tested by models trained on all others (METHOD/fold_F01/seed_0), or
together with the others of its fold where folds are given. Accuracies are those of all tested videos together.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from transformers.utils.logging import disable_progress_bar

from ..measure.jobs import ROOT, Job, read_json, run_jobs, write_json
from ..measure.records import conditions, provenance
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..training.arguments import DataArguments, ModelArguments, TrainingArguments
from ..training.cli import flags_of, parse_recipe
from ..training.evaluation import FRAME_ORDERS
from ..training.run_info import FREE_SETTINGS, describe_run, first_change, settings_of
from ..training.setup import build_model
from .baselines import fit_baselines
from .folds import Fold, check_folds, split_by_group
from .measure import counts_of
from .report import write_report
from .views import evaluate_views


TRAINING_CLASSES = [ModelArguments, DataArguments, TrainingArguments]
DECIDED = ("seed", "output_dir", "resume")  # of train.py's settings, by the comparison
OPEN = {f.name for c in TRAINING_CLASSES for f in fields(c)} - {*DECIDED}
PLACES = ("train_dir", "eval_dir", "layout", "train_split", "video_root", "allow_outside_root")


@dataclass
class ComparisonArguments:
    """What is compared."""

    recipe: str = field(default=None, metadata={"help": "The recipe of all runs, as train.py takes it."})
    output_dir: str = field(default=None, metadata={"help": "Folder for the runs, the table and the picture."})
    records_dir: str | None = field(
        default=None, metadata={"help": "Folder for the records of finished runs; default: output_dir/records."}
    )
    methods: dict | None = field(
        default=None, metadata={"help": "Each method's name with the settings of train.py that make it (JSON here)."}
    )
    overrides: dict | None = field(
        default=None, metadata={"help": "Settings of train.py for all runs, instead of the recipe's (JSON here)."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Each method is trained with each."})
    group: str | None = field(
        default=None,
        metadata={
            "help": "Cross-validate: the expression whose first parenthesis, in a video's file name, is its group; "
            "each is tested by models trained on the others. The recipe's eval_dir then counts for nothing."
        },
    )
    folds: list[str] | None = field(
        default=None,
        metadata={"help": "Groups that are tested together: a list for each fold, as '[F01, F02]' '[M01, M02]'."},
    )
    baselines: bool = field(
        default=False, metadata={"help": "Also ridge regression on pixels and on the tower's frame features."}
    )
    num_clips: int = field(default=1, metadata={"help": "Clips of each video that the table's accuracies count."})
    num_crops: int = field(default=1, metadata={"help": "Crops of each of these clips: 1 (centre) or 3."})
    frame_orders: list[str] | None = field(
        default=None, metadata={"help": "Also top-1 of the same models on frames in these orders: reversed, shuffled."}
    )
    jobs: int = field(default=1, metadata={"help": "Runs at a time; they share the processor's cores equally."})
    measure_rounds: int = field(
        default=3, metadata={"help": "How often speed and memory are measured, for their medians; 0: not at all."}
    )
    measure_batch_size: int | None = field(
        default=None, metadata={"help": "Clips in a batch when speed and memory are measured; default: the recipe's."}
    )
    train_script: str | None = field(
        default=None, metadata={"help": "Path to train.py; default: in scripts, next to the package."}
    )

    def __post_init__(self):
        if not self.methods or not all(isinstance(settings, dict) for settings in self.methods.values()):
            raise ValueError(f"methods must map names to settings of train.py, each a mapping; got {self.methods!r}.")
        for name in self.methods:
            if Path(name).name != name or name.startswith(".") or "|" in name:
                raise ValueError(f"the method {name!r} names a folder: it can have no / or |, nor begin with a dot.")
        for place, settings in (("overrides", self.overrides or {}), *self.methods.items()):
            if wrong := [name for name in DECIDED if name in settings]:
                raise ValueError(f"{place}: {wrong[0]} is not for a method to set; give the comparison's own setting.")
            if empty := [name for name, value in settings.items() if value is None]:
                raise ValueError(f"{place}: {empty[0]} has no value; give one or leave it out.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers, at least one, got {self.seeds}.")
        if self.num_crops not in (1, 3):
            raise ValueError(f"num_crops must be 1 or 3, got {self.num_crops}.")
        self.frame_orders = self.frame_orders or []
        if not set(self.frame_orders) <= set(FRAME_ORDERS[1:]):
            raise ValueError(f"frame_orders must be among {', '.join(FRAME_ORDERS[1:])}, got {self.frame_orders}.")
        for name in ("jobs", "num_clips", "measure_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.measure_rounds < 0:
            raise ValueError(f"measure_rounds must be at least 0, got {self.measure_rounds}.")
        self.folds = check_folds(self.group, self.folds)
        self.records_dir = self.records_dir or f"{self.output_dir}/records"
        self.train_script = self.train_script or str(ROOT / "scripts" / "train.py")
        if not Path(self.train_script).is_file():
            raise ValueError(f"there is no {self.train_script}; give scripts/train.py of the repository.")

    @property
    def views(self) -> dict[str, int]:
        return {"num_clips": self.num_clips, "num_crops": self.num_crops}


class Run(NamedTuple):
    """One training: `command` are the arguments of train.py, `parsed` what it makes of them."""

    method: str
    fold: Fold | None
    seed: int
    folder: Path
    record: Path
    command: list[str]
    parsed: tuple[ModelArguments, DataArguments, TrainingArguments]

    def __str__(self):
        return f"{self.method}, {self.part}"

    @property
    def part(self) -> str:
        return f"seed {self.seed}" if self.fold is None else f"fold {self.fold.name}, seed {self.seed}"

    def result(self, several_views: bool, orders: list[str]) -> dict:
        """The last evaluation of a finished run, of one view, or that of several; by their names those in `orders`."""
        record = read_json(self.record)
        found = record["views"] if several_views else record["evaluations"][-1]
        found = {**found, **{order: record["orders"][order] for order in orders}}
        return found if self.fold is None else {**found, "eval_num_videos": len(self.fold.test)}


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The comparison's own arguments, and train.py's flags with their values."""
    own, passed = [], []
    target = own
    for argument in arguments:
        if argument.startswith("--"):
            target = passed if argument[2:].partition("=")[0].replace("-", "_") in OPEN else own
        target.append(argument)
    return own, passed


def plan_folds(args: ComparisonArguments, passed: list[str]) -> list[Fold | None]:
    """The folds, or None alone where there is no cross-validation. Raises ValueError for what does not fit."""
    if args.group is None:
        return [None]
    flags = {flag[2:].partition("=")[0].replace("-", "_") for flag in passed if flag.startswith("--")}
    if "eval_dir" in flags | (args.overrides or {}).keys():
        raise ValueError("eval_dir must be left out with group, which takes the videos to test from train_dir.")
    for name, settings in args.methods.items():
        if own := [place for place in PLACES if place in settings]:
            raise ValueError(f"{name}: {own[0]} must be the same for all methods with group; give it as a flag.")
    method, settings = next(iter(args.methods.items()))
    command = [*command_of(args, passed, settings), f"--output_dir={args.output_dir}"]
    try:
        data = parse_recipe(TRAINING_CLASSES, command)[1]
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None
    return split_by_group(data, args.group, args.folds, Path(args.output_dir) / "folds")


def command_of(args: ComparisonArguments, passed: list[str], settings: dict) -> list[str]:
    return [args.recipe, *flags_of(args.overrides or {}), *passed, *flags_of(settings)]


def plan_runs(args: ComparisonArguments, passed: list[str]) -> list[Run]:
    """All runs, the first seed of every method first: a first table, and every mistake, come early.

    Raises ValueError, with the method's name and train.py's own message, for settings that do not fit.
    """
    runs, folds = [], plan_folds(args, passed)
    for seed, fold, (name, settings) in product(args.seeds, folds, args.methods.items()):
        place = Path(name) if fold is None else Path(name, f"fold_{fold.name}")
        folder = Path(args.output_dir, place, f"seed_{seed}")
        record = Path(args.records_dir, place, f"seed_{seed}.json")
        command = [*command_of(args, passed, settings), *flags_of(fold.settings if fold else {})]
        command += [f"--seed={seed}", f"--output_dir={folder}", "--resume"]
        try:
            run = Run(name, fold, seed, folder, record, command, parse_recipe(TRAINING_CLASSES, command))
            if run.parsed[0].host is not None:
                raise ValueError("host must be left out here: hosts are compared by `compare.py hosts`.")
            if run.parsed[1].eval_dir is None:
                raise ValueError("there is nothing to compare by: give eval_dir.")
            check_settings(run)
            first = seed == args.seeds[0] and fold is folds[0]
            if first and not (folder / "run.json").exists() and not record.exists():
                build_model(run.parsed[0], ["a", "b"])  # what does not fit shows here, not after hours
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        runs.append(run)
    return runs


def check_settings(run: Run) -> None:
    """Raise a ValueError if the run was begun, or has ended, with other settings or other videos than now."""
    begun, finished = read_json(run.folder / "run.json"), read_json(run.record)
    now = {str(i): asdict(part) for i, part in enumerate(run.parsed)}
    if finished is not None:
        before, now = finished["settings"], {"settings": settings_for_record(run)}
        where = run.record
    elif begun is not None:
        before, where = settings_of(begun["arguments"]), run.folder
    else:
        return
    changed = first_change(before, settings_of(now))
    if changed is not None:
        name, old, new = changed
        raise ValueError(
            f"{name} must be {old!r} as {run.part} was trained with, got {new!r}; give that, remove {where}, or "
            "compare in another output_dir or records_dir."
        )


def settings_for_record(run: Run) -> dict:
    """The settings that decide a run's result; folders, which differ between machines, by their contents."""
    settings = settings_of({str(i): asdict(part) for i, part in enumerate(run.parsed)})
    settings |= run.fold.described if run.fold else {}
    for name in ("model", "train_dir", "eval_dir", "video_root"):
        if settings[name] is not None and Path(settings[name]).exists():
            settings[name] = describe_folder(Path(settings[name]), contents=name == "model")
    settings = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    return json.loads(json.dumps(settings))


@cache
def describe_folder(folder: Path, contents: bool) -> str:
    """The number of files and a fingerprint of their names and sizes, or contents."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) or [folder]
    parts = [(p.relative_to(folder).as_posix(), p.read_bytes() if contents else p.stat().st_size) for p in files]
    return f"{len(files)} files, {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def write_record(run: Run, seconds: float) -> dict:
    """Write what is kept of a finished run, `seconds` from its last start; returns it."""
    lines = list(map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()))
    evaluations = [line for line in lines if "eval_top1" in line]
    losses = {line["epoch"]: line["loss"] for line in lines if "loss" in line}  # the last of each epoch
    record = {
        "method": run.method,
        **({} if run.fold is None else {"fold": run.fold.groups}),
        "seed": run.seed,
        "settings": settings_for_record(run),
        "evaluations": evaluations,
        "losses": losses,
        "num_labels": InTIClipVisionConfig.from_pretrained(run.folder / "last").num_labels,
        "seconds": seconds,
        **provenance(),
    }
    run.record.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.record, record)
    return record


def train_all(runs: list[Run], args: ComparisonArguments) -> None:
    """Train every run that has no record, and write its record."""
    by_record = {run.record: run for run in runs}

    def done(job: Job, seconds: float) -> str:
        run = by_record[job.output]
        for file in run.record.parent.glob("measurement_*.json"):
            if run.seed == args.seeds[0]:
                file.unlink()  # of an earlier model
        return f"{run}: top-1 {write_record(run, seconds)['evaluations'][-1]['eval_top1']:.1%}"

    jobs = [Job(str(run), [args.train_script, *run.command], run.folder / "log.txt", run.record) for run in runs]
    run_jobs(jobs, args.jobs, torch.get_num_threads(), "Training", done)


def measure_all(runs: list[Run], args: ComparisonArguments) -> dict[str, dict]:
    """Measure the models of the first seed (and fold), one process after the other: measurements by method.

    The methods take turns, so that a machine that is slow for a while is not slow for one of them: of every number
    the median of the rounds counts. Without rounds, what can be counted.
    """
    first = runs[: len(args.methods)]
    if not args.measure_rounds:
        return {run.method: counts_of(untrained_model(run)) for run in first}
    threads = torch.get_num_threads()
    jobs = []
    for i in range(args.measure_rounds):
        for run in first:
            batch_size = args.measure_batch_size or run.parsed[2].batch_size
            output = run.record.with_name(f"measurement_{i}.json")
            found = read_json(output)
            if found and found["conditions"] != conditions(batch_size, threads):
                output.unlink()  # of another machine, say: speeds are compared under the same conditions
            folder = model_folder(run) if not output.exists() else run.folder
            command = ["hf_inti.comparison.measure", str(folder), str(batch_size), str(output)]
            log = run.folder.parent / "measurement_log.txt"
            jobs.append(Job(f"{run.method}, round {i + 1}", command, log, output))
    run_jobs(jobs, 1, threads, "Measuring", lambda job, seconds: f"{job.name}: measured")
    measurements = {}
    for run in first:
        rounds = [read_json(run.record.with_name(f"measurement_{i}.json")) for i in range(args.measure_rounds)]
        numbers = {name: [found[name] for found in rounds] for name in rounds[0] if name != "conditions"}
        medians = {name: None if None in values else median(values) for name, values in numbers.items()}
        measurements[run.method] = {**medians, "conditions": rounds[0]["conditions"]}
    return measurements


def model_folder(run: Run) -> Path:
    """The trained model; if only its record is here, an untrained one, which costs the same."""
    if (run.folder / "last").exists():
        return run.folder / "last"
    folder = run.folder / "untrained"
    if not (folder / "run.json").exists():
        untrained_model(run).save_pretrained(folder)
        write_json(folder / "run.json", describe_run(*run.parsed))
    return folder


def untrained_model(run: Run) -> InTIClipForVideoClassification:
    return build_model(run.parsed[0], [str(i) for i in range(read_json(run.record)["num_labels"])])


def main(arguments: list[str]) -> int:
    """`compare.py methods`: train, measure and report, from `[--config] CONFIG.yaml --flags`.

    Returns the exit status. Raises ValueError for settings that do not fit, settings that differ from those of runs
    that are there already, and for a run that failed.
    """
    own, passed = split_flags(list(arguments))
    if "--config" in own[:-1]:
        i = own.index("--config")
        own = [own[i + 1], *own[:i], *own[i + 2 :]]
    args = parse_recipe([ComparisonArguments], own, description=__doc__)[0]
    several_views = args.num_clips * args.num_crops > 1
    disable_progress_bar()  # of loading weights, beside ours
    try:
        runs = plan_runs(args, passed)
        folds = list({run.fold.name: run.fold for run in runs if run.fold}.values())
        for fold in folds:
            fold.write()
        train_all(runs, args)
        if orders := ["original"] * several_views + args.frame_orders:
            evaluate = Path(args.train_script).with_name("evaluate.py")
            evaluate_views(runs, evaluate, args.views, orders, args.jobs, torch.get_num_threads())
        measurements = measure_all(runs, args)
    except KeyboardInterrupt:
        print("Stopped; run the same command to continue.", file=sys.stderr)
        return 130
    results = {name: [] for name in args.methods}
    for run in runs:
        results[run.method].append(run.result(several_views, args.frame_orders))
    if args.baselines:
        results |= baselines_of(runs, args)
    views = f"{args.num_clips} clips x {args.num_crops} crops" if several_views else "one view"
    _, data, training = runs[0].parsed
    where = f"trained on {data.train_dir}, evaluated on {data.eval_dir}"
    if folds:
        where = f"trained and evaluated on {folds[0].source}, {len(folds)} folds by `{args.group}`,"
    about = f"{args.recipe}, {training.epochs} epochs, {where} in {views}"
    names = [fold.name for fold in folds]
    folder = Path(args.output_dir)
    print(write_report(results, measurements, args.seeds, about, folder, names, args.frame_orders))
    return 0


def baselines_of(runs: list[Run], args: ComparisonArguments) -> dict[str, list[dict]]:
    """Of each baseline the evaluation of each fold, or one; as the first method's runs read the videos."""
    results: dict[str, list[dict]] = {}
    for run in runs[:: len(args.methods)]:
        if run.seed == args.seeds[0]:
            folder = Path(args.records_dir, *([] if run.fold is None else [f"fold_{run.fold.name}"]))
            videos = None if run.fold is None else run.fold.described
            found = fit_baselines(*run.parsed[:2], folder, args.views, args.frame_orders, videos)
            for name, result in found.items():
                results.setdefault(name, []).append(result)
    return results
