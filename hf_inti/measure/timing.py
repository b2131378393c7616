"""Timing contestants side by side: interleaved repetitions, medians, requirements, and a report of them.

A *row* is what is known of one contestant, a dict by field: `seconds` (median), `low` and `high` (quartiles) and
whatever else was measured or counted of it. Rows by contestant's name are the whole result.
"""

import gc
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import tqdm

from .jobs import write_json
from .records import conditions, provenance, source_line
from .tables import markdown_table


WARM_UP = 2  # repetitions that do not count


@dataclass
class TimingArguments:
    """What all benchmarks share."""

    output_dir: str = field(default=None, metadata={"help": "Folder for the table, the numbers and the picture."})
    threads: int | None = field(default=None, metadata={"help": "Of the processor; default: as torch finds it."})
    repetitions: int = field(default=7, metadata={"help": "Of each contestant, in turns; two more are warming up."})
    require: list[str] = field(
        default_factory=list,
        metadata={"help": "Targets, such as 'seconds inti / naive <= gmacs + 0.03'; a missed one is an error."},
    )

    def __post_init__(self):
        for name in ("threads", "repetitions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        self.require = [Requirement.parse(text) for text in self.require]

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a ValueError for a requirement of none of these contestants: before they are timed, not after."""
        for requirement in self.require:
            for name in filter(None, (requirement.name, requirement.other)):
                if name not in names:
                    raise ValueError(f"{requirement.text!r}: there is no {name!r} among {', '.join(names)}.")

    def pin_threads(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)


def interleave(
    contestants: dict[str, Callable[[], object]], repetitions: int, description: str = "Timing", warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Run all contestants in turns, `repetitions` times after warming up: the seconds that each took, by name.

    Every round begins with another one, so that what goes before it is not always the same. On CUDA time is taken by
    events on the device.
    """
    device = PartialState().device
    names, times = list(contestants), {name: [] for name in contestants}
    rounds = warm_up + repetitions
    with tqdm(total=rounds * len(names), desc=description, unit="run") as bar:
        for n in range(rounds):
            first = n % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()  # here and not in the middle of what is timed
                bar.set_postfix_str(name, refresh=False)
                taken = _seconds(contestants[name], device)
                if n >= warm_up:
                    times[name].append(taken)
                bar.update()
    return times


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles of seconds, as the fields `seconds`, `low` and `high`."""
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"seconds": median(times), "low": low, "high": high, "repetitions": len(times)}


class Requirement(NamedTuple):
    """`FIELD NAME [/ OTHER] <= BOUND`: a bound on a field, or on a ratio of two contestants' fields.

    BOUND is a number, or `FIELD [+ number]`, the same ratio of another field: `seconds inti / naive <= gmacs + 0.03`.
    """

    text: str
    field: str
    name: str
    other: str | None
    relation: str
    bound_field: str | None
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """Raises ValueError for anything else."""
        name, number = r"[^\s/<>]+", r"\d+(?:\.\d+)?(?:e-?\d+)?"
        pattern = rf"(\w+) ({name})(?: ?/ ?({name}))? (<=|>=) (?:(?:([a-z_]+)(?: ?\+ ?({number}))?)|({number}))"
        found = re.fullmatch(pattern, " ".join(text.split()))
        if found is None:
            raise ValueError(
                f"a requirement reads 'FIELD NAME / OTHER <= NUMBER' or '... <= FIELD + NUMBER', or is of one NAME "
                f"alone, with <= or >=; got {text!r}."
            )
        of, first, second, relation, bound_field, more, bound = found.groups()
        return cls(text, of, first, second, relation, bound_field, float(bound or more or 0))

    def _value(self, rows: dict[str, dict], of: str) -> float:
        values = []
        for name in filter(None, (self.name, self.other)):
            if name not in rows:
                raise ValueError(f"{self.text!r}: there is no {name!r}; what was measured: {', '.join(rows)}.")
            if rows[name].get(of) is None:
                known = [key for key, value in rows[name].items() if isinstance(value, (int, float))]
                raise ValueError(f"{self.text!r}: {name} has no {of!r}; its numbers are {', '.join(known)}.")
            values.append(rows[name][of])
        if self.other and values[1] == 0:
            raise ValueError(f"{self.text!r}: {of} of {self.other} is 0, there is no ratio to it.")
        return values[0] / values[1] if self.other else values[0]

    def check(self, rows: dict[str, dict]) -> "Verdict":
        """Raises ValueError where it names a contestant or a field that the rows do not have."""
        value = self._value(rows, self.field)
        bound = self.bound + (self._value(rows, self.bound_field) if self.bound_field else 0)
        return Verdict(self.text, value, bound, value <= bound if self.relation == "<=" else value >= bound)


class Verdict(NamedTuple):
    """What became of a requirement."""

    text: str
    value: float
    bound: float
    met: bool


# What a table shows of a row: the field, its head, and how its number is written.
COLUMNS = {
    "gmacs": ("GMACs", "{:.4g}"),
    "seconds": ("ms", "{:.0f}"),
    "clips_per_second": ("clips/s", "{:.3g}"),
    "gmacs_per_second": ("GMACs/s", "{:.0f}"),
    "matrix_fraction": ("of matrix rate", "{:.0%}"),
    "peak_memory_bytes": ("peak memory MB", "{:.0f}"),
    "activation_memory_bytes": ("activations MB", "{:.0f}"),
    "file_bytes": ("file MB", "{:.0f}"),
    "difference": ("largest difference", "{:.1e}"),
}


def cell(name: str, row: dict) -> str:
    """A field of a row as text; milliseconds come with their quartiles."""
    value = row.get(name)
    if value is None:
        return "-"
    if name == "seconds":
        scale = 1 if value >= 0.1 else 2  # digits behind the point are for short times
        digits = 0 if scale == 1 else 2
        return f"{1e3 * value:.{digits}f} ({1e3 * row['low']:.{digits}f} to {1e3 * row['high']:.{digits}f})"
    return COLUMNS[name][1].format(value / 1e6 if name.endswith("_bytes") else value)


def report(
    title: str,
    rows: dict[str, dict],
    args: TimingArguments,
    about: str,
    batch_size: int = 1,
    picture: bool = True,
    overview: str = "",
) -> int:
    """Write benchmark.md, benchmark.json and benchmark.png into `args.output_dir` and print the first.

    `overview` is a shorter table, shown first. Returns the exit status: 1 where a requirement is missed. Raises
    ValueError, when all is written, for a requirement of something that was not measured.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    where, record = conditions(batch_size, torch.get_num_threads()), provenance()
    verdicts, mistakes = [], []
    for requirement in args.require:
        try:
            verdicts.append(requirement.check(rows))
        except ValueError as error:  # what was measured is written all the same
            mistakes.append(error)
    fields = [name for name in COLUMNS if any(row.get(name) is not None for row in rows.values())]
    heads = ["", *(COLUMNS[name][0] for name in fields)]
    lines = [[name, *(cell(f, row) for f in fields)] for name, row in rows.items()]
    text = f"### {title}\n\n" + (f"{overview}\n" if overview else "") + markdown_table(heads, lines)
    text += (
        f"\n{about} Medians of {args.repetitions} repetitions in turns (quartiles in brackets), {where['device']}, "
        f"{where['threads']} threads, torch {where['torch']}.\n\n{source_line(record)}\n"
    )
    if verdicts:
        lines = [[v.text, f"{v.value:.3g}", f"{v.bound:.3g}", "met" if v.met else "MISSED"] for v in verdicts]
        text += "\n" + markdown_table(["required", "measured", "bound", ""], lines)
    (folder / "benchmark.md").write_text(text)
    write_json(
        folder / "benchmark.json",
        {
            "title": title,
            "about": about,
            **record,
            "conditions": where,
            "rows": rows,
            "required": [v._asdict() for v in verdicts],
        },
    )
    if picture:
        bars(title, rows, folder / "benchmark.png")
    print(text)
    if mistakes:
        raise mistakes[0]
    return 0 if all(v.met for v in verdicts) else 1


def bars(title: str, rows: dict[str, dict], path: Path) -> None:
    """Draw the medians as bars with their quartiles, the first row on top."""
    from matplotlib.figure import Figure

    timed = {name: row for name, row in rows.items() if "seconds" in row}
    figure = Figure(figsize=(8, 0.8 + 0.35 * len(timed)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    seconds = [row["seconds"] for row in timed.values()]
    spread = [[s - row["low"] for s, row in zip(seconds, timed.values(), strict=True)]]
    spread += [[row["high"] - s for s, row in zip(seconds, timed.values(), strict=True)]]
    axes.barh(list(timed), [1e3 * s for s in seconds], xerr=[[1e3 * s for s in side] for side in spread], capsize=2)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def read_report(folder: str | Path) -> dict:
    """What `report` wrote as JSON."""
    return json.loads((Path(folder) / "benchmark.json").read_text())
