"""Run the mutants of a Cosmic Ray session, each against the tests that cover its line.

    make mutants [AGAIN=--again]

Cosmic Ray makes the mutants and keeps the results (results/mutants/session.sqlite, so that a run that was stopped goes
on); this script runs the tests. Starting Python and importing torch and transformers takes longer than the tests of a
mutant, so they are imported once, and each mutant is a fork which imports the mutated module in place of the file.
Writes mutants.csv and summary.md to the same folder; why a survivor is equivalent or harmless is told in harmless.csv
beside this script, by file and line of code.
"""

import contextlib
import csv
import difflib
import gc
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from datetime import UTC, datetime
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

import cosmic_ray.plugins
import coverage
import pytest
from accelerate.utils import tqdm
from cosmic_ray.mutating import mutate_code
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results" / "mutants"
CONFIG = ROOT / "tests" / "mutation" / "cosmic_ray.toml"
HARMLESS = ROOT / "tests" / "mutation" / "harmless.csv"
SESSION, COVERING = FOLDER / "session.sqlite", FOLDER / "covering.json"
TESTS = (
    "adaptations compression_inti configuration contract edges inference methods method_references modeling "
    "reference_vectors sta stts video_processing"
).split()
SLOW = 6.0  # seconds; slower tests are left out
TIMEOUT = 90.0  # seconds for all tests of a mutant
MEMORY = 8 * 2**30  # bytes a mutant may take
BROKEN = 70  # exit status of a process in which this script failed, and not a test


def run_pytest(files: list[str], plugin, *options: str) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        # Assertions as they are: what pytest would rewrite is imported before.
        quiet = [
            "-q",
            "--no-header",
            "--assert=plain",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-m",
            "not slow",
            "-k",
            "not compil",
        ]
        return pytest.main([*quiet, f"--basetemp={scratch}/tmp", *options, *files], plugins=[plugin])


class Durations:
    """Seconds of every test that passed."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        if report.passed:
            self.seconds[report.nodeid] += report.duration


class Chosen:
    """Runs only the given tests, in their order."""

    def __init__(self, tests: list[str]):
        self.rank = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.rank), key=lambda i: self.rank[i.nodeid])


def find_covering_tests() -> dict[str, dict]:
    """ "tests": for each file of the model and line, the tests that run it, the fastest first; line "0" stands for all.

    "seconds": of each test.
    """
    files = [f"tests/test_{name}.py" for name in TESTS]
    durations = Durations()
    data_file = tempfile.mktemp(suffix=".coverage")
    os.environ["COVERAGE_FILE"] = data_file
    if (
        run_pytest(files, durations, "-p", "pytest_cov", "--cov=hf_inti/model", "--cov-context=test", "--cov-report=")
        != 0
    ):
        raise SystemExit("error: the tests must pass before anything is mutated.")
    data = coverage.CoverageData(data_file)
    data.read()
    covering = {}
    for path in data.measured_files():
        lines: dict[str, set[str]] = defaultdict(set)
        for line, contexts in data.contexts_by_lineno(path).items():
            for test in {context.partition("|")[0] for context in contexts}:
                if test and durations.seconds.get(test, SLOW) < SLOW:
                    lines[str(line)].add(test)
                    lines["0"].add(test)
        key = durations.seconds.__getitem__
        covering[Path(path).name] = {line: sorted(tests, key=key) for line, tests in lines.items()}
    return {"tests": covering, "seconds": durations.seconds}


class MutatedLoader(SourceFileLoader):
    """Loads a module from a mutated source; the file stays as it is."""

    def __init__(self, name: str, path: str, source: str):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname):
        return compile(self.source, self.path, "exec", dont_inherit=True)


class MutatedFinder:
    def __init__(self, path: Path, source: str):
        self.name, self.path, self.source = f"hf_inti.model.{path.stem}", str(ROOT / path), source

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return spec_from_file_location(name, self.path, loader=MutatedLoader(name, self.path, self.source))
        return None


def is_left_out(mutation) -> bool:
    """Of each number Cosmic Ray makes two mutants, one more and one less: the second is left out."""
    return mutation.operator_name == "core/NumberReplacer" and mutation.occurrence % 2 == 1


def tests_for(mutation, covering: dict) -> list[str]:
    lines = covering.get(mutation.module_path.name, {})
    found: set[str] = set()
    for line in range(mutation.start_pos[0], mutation.end_pos[0] + 1):
        found.update(lines.get(str(line), ()))
    order = lines.get("0", [])  # of a line that runs on import alone, such as a default: all tests of the file
    return [test for test in order if test in found] if found else order


def try_mutant(mutation, tests: list[str], seconds: dict[str, float], diff_file: str) -> int:
    """In a process of its own: the exit status of the tests with the mutant in place."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    source = (ROOT / mutation.module_path).read_text()
    operator = cosmic_ray.plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
    mutated = mutate_code(source, operator, mutation.occurrence)
    changed = difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0)
    Path(diff_file).write_text("\n".join(list(changed)[3:]))
    sys.meta_path.insert(0, MutatedFinder(mutation.module_path, mutated))
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        by_file[test.partition("::")[0]].append(test)
    # File by file, since collecting takes longer than running.
    for file in sorted(by_file, key=lambda file: sum(seconds[test] for test in by_file[file])):
        if status := run_pytest([file], Chosen(by_file[file]), "-x"):
            return int(status)
    return 0


def start(item, covering: dict, diff_file: str) -> int:
    mutation = item.mutations[0]
    tests = tests_for(mutation, covering["tests"])
    pid = os.fork()
    if pid == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        try:
            status = try_mutant(mutation, tests, covering["seconds"], diff_file) if tests else 0
        except BaseException:
            Path(diff_file).write_text(traceback.format_exc())
            status = BROKEN
        os._exit(status)
    return pid


def run_mutants(covering: dict, workers: int) -> None:
    running: dict[int, tuple] = {}
    with use_db(SESSION) as session, tempfile.TemporaryDirectory() as scratch:
        waiting = [item for item in session.pending_work_items if not is_left_out(item.mutations[0])]
        bar = tqdm(total=len(waiting), desc="Mutants", unit="mutant")
        while waiting or running:
            while waiting and len(running) < workers:
                item = waiting.pop()
                diff_file = os.path.join(scratch, item.job_id)
                running[start(item, covering, diff_file)] = (item, diff_file, time.monotonic() + TIMEOUT)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                for late in [pid for pid, (_, _, end) in running.items() if time.monotonic() > end]:
                    os.killpg(late, signal.SIGKILL)
                time.sleep(0.02)
                continue
            item, diff_file, _ = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            outcome = TestOutcome.SURVIVED if code == 0 else TestOutcome.KILLED
            diff = Path(diff_file).read_text() if os.path.exists(diff_file) else ""
            # Cosmic Ray cannot write all mutants that it plans: none of `except module.Error`.
            worker_outcome = WorkerOutcome.EXCEPTION if code == BROKEN else WorkerOutcome.NORMAL
            note = "timeout" if code == -signal.SIGKILL else f"exit status {code}"
            session.set_result(item.job_id, WorkResult(worker_outcome, note, outcome, diff))
            bar.update()


def report() -> None:
    with HARMLESS.open(newline="") as file:
        why = {(row["file"], row["before"], row["after"]): row["why"] for row in csv.DictReader(file)}
    rows = []
    with use_db(SESSION) as session:
        results = dict(session.results)
        for item in session.work_items:
            result, mutation = results.get(item.job_id), item.mutations[0]
            if result is None or result.worker_outcome is not WorkerOutcome.NORMAL:
                continue
            old, _, new = (result.diff or "").partition("\n+")
            before, after = old.removeprefix("-").strip(), new.strip()
            survived = result.test_outcome is TestOutcome.SURVIVED
            rows.append(
                {
                    "file": mutation.module_path.name,
                    "line": mutation.start_pos[0],
                    "operator": mutation.operator_name.removeprefix("core/"),
                    "outcome": result.test_outcome.value,
                    "how": result.output,
                    "before": before,
                    "after": after,
                    "why": why.get((mutation.module_path.name, before, after), "") if survived else "",
                }
            )
    rows.sort(key=lambda row: (row["file"], row["line"], row["operator"], row["after"]))
    with (FOLDER / "mutants.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    broken = sum(result.worker_outcome is WorkerOutcome.EXCEPTION for result in results.values())
    lines = ["| file | mutants | killed | survived | killed % |", "|---|---:|---:|---:|---:|"]
    for name in [*sorted({row["file"] for row in rows}), "all"]:
        of = [row for row in rows if name in (row["file"], "all")]
        killed = sum(row["outcome"] == "killed" for row in of)
        lines.append(f"| {name} | {len(of)} | {killed} | {len(of) - killed} | {100 * killed / len(of):.1f} |")
    unexplained = sum(row["outcome"] == "survived" and not row["why"] for row in rows)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    about = f"`make mutants`, commit {commit.stdout.strip()}, {datetime.now(UTC):%Y-%m-%d}."
    lines += ["", f"Survivors without a reason: {unexplained}. Planned, but not made by Cosmic Ray: {broken}."]
    (FOLDER / "summary.md").write_text("\n".join([about, "", *lines]) + "\n")
    print("\n".join(lines))


def forget_survivors() -> None:
    """So that what survived, or was given up, is tried against the tests as they are now."""
    with contextlib.closing(sqlite3.connect(SESSION)) as database, database:
        database.execute("DELETE FROM work_results WHERE test_outcome = 'SURVIVED' AND worker_outcome = 'NORMAL'")
        database.execute("DELETE FROM work_results WHERE output = 'timeout'")
    COVERING.unlink(missing_ok=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Mutants at a time.")
    parser.add_argument("--again", action="store_true", help="Try again what survived, against the tests of now.")
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes half a second
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not SESSION.exists():
        tools = Path(sys.executable).parent
        subprocess.run([tools / "cosmic-ray", "init", CONFIG, SESSION], check=True)
        subprocess.run([tools / "cr-filter-operators", SESSION, CONFIG], check=True)
    if args.again:
        forget_survivors()
    if not COVERING.exists():  # in a process of its own, since nothing of the package may be imported here
        if os.fork() == 0:
            COVERING.write_text(json.dumps(find_covering_tests()))
            os._exit(0)
        if os.wait()[1] != 0:
            raise SystemExit("error: the coverage run failed; see above.")
    warm_up()
    run_mutants(json.loads(COVERING.read_text()), args.workers)
    report()


def warm_up() -> None:
    """Import what takes time and is never mutated."""
    import av  # noqa: F401
    import torch
    import transformers.models.auto.video_processing_auto
    import transformers.models.clip.modeling_clip
    import transformers.models.videomae.modeling_videomae
    import transformers.pipelines
    import transformers.video_processing_utils  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # pytest collects garbage twice: without all these modules it takes a tenth of the time


if __name__ == "__main__":
    main()
