"""The table of docs/reliability.md, from what the other scripts wrote.

    python tests/reliability/report.py && python docs/update_tables.py

A row needs its file in results/reliability/.
"""

import json
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hf_inti.measure.jobs import write_json  # noqa: E402
from hf_inti.measure.records import provenance  # noqa: E402
from hf_inti.measure.tables import markdown_table  # noqa: E402


FOLDER = ROOT / "results" / "reliability"
HEADS = ["broken", "times", "what came of it", "lost", "command", "file"]


def kills(found: dict) -> tuple[str, str, str, str]:
    half = found["with_half_a_checkpoint"]
    return (
        f"SIGKILL at a random time or file operation, {half} times with a checkpoint half written",
        str(found["kills"]),
        f"every resume went on; all {found['runs']} runs ended bit for bit like one that never stopped",
        str(found["lost"] + found["different"]),
    )


def faults(found: dict) -> tuple[str, str, str, str]:
    names = ", ".join(fault["fault"] for fault in found["faults"])
    return names, f"{len(found['faults'])}, each once", "one message each, none a traceback", str(found["lost"])


def processes(found: dict) -> tuple[str, str, str, str]:
    apart = max(value for name, value in found.items() if name.startswith("loss_difference"))
    scores = max(value for name, value in found.items() if name.startswith("evaluation_difference"))
    return (
        "1, 2 and 4 processes; 4, then 2, then 1 for one run; one of 2 dies; SIGTERM to all of a job of 2",
        f"{found['steps']} steps",
        f"losses at most {apart:.0e} apart, scores {scores:.0e}; the job ended "
        f"{found['seconds_until_torchrun_fails']:.0f} s after the death, and had saved when it ended "
        f"{found['seconds_until_a_signal_ends']:.0f} s after the signal",
        "0",
    )


def fsdp(found: dict) -> tuple[str, str, str, str]:
    return (
        "weights split over 2 processes with FSDP2 (gloo); stopped and resumed",
        f"{found['steps']} steps",
        f"losses at most {found['loss_difference']:.0e} from one process's, and {found['loss_difference_resumed']:.0e} "
        f"from an unstopped run's; saved models' logits {found['logit_difference']:.0e}",
        "0",
    )


def steady(found: dict) -> tuple[str, str, str, str]:
    grown = f"resident set {found['mib_settled']} MiB after a fifth, {found['mib_last']} at the end"
    times = f"{found['steps']} steps, {found['evaluations']} evaluations"
    return "nothing: a long run", times, grown, "0"


def lengths(found: dict) -> tuple[str, str, str, str]:
    rows = found["read"]
    times = ", ".join(f"{row['video_seconds']} s" for row in rows)
    return "nothing: long videos", times, f"{', '.join(str(row['mib']) for row in rows)} MiB for 16 frames", "0"


def bulk(found: dict) -> tuple[str, str, str, str]:
    killed = [run for run in found["kills"] if not run["ended"]]
    bad = sum(run["twice"] + run["lost"] for run in found["kills"]) + found["end"]["twice"] + found["end"]["missing"]
    outcome = f"the next run did the rest: all {found['end']['videos']} videos there, none twice; no process left"
    return "SIGKILL of `scripts/bulk.py`, while it starts or writes shards", str(len(killed)), outcome, str(bad)


def nodes(found: dict) -> tuple[str, str, str, str]:
    killed = [run for run in found["kills"] if not run["ended"]]
    after = max(run["seconds_after"] for run in killed)
    outcome = (
        f"the other did the rest: each time all {found['videos']} videos there, none twice, at most {after:.0f} s later"
    )
    bad = sum(run["missing"] + run["twice"] for run in found["kills"])
    return "SIGKILL of one of two Ray nodes during a bulk run", str(len(killed)), outcome, str(bad)


def fuzz(found: dict) -> tuple[str, str, str, str]:
    bad = found["hung"] + found["crashed"] + found["failed"]
    outcome = f"{found['decoded']:,} read, {found['refused'] + found['too_large']:,} refused, {bad} else; at most "
    outcome += f"{found['longest']['seconds']:.1f} CPU s and {found['largest']['bytes'] / 2**20:.0f} MiB each"
    return f"videos: {found['files']} files, mutated", f"{found['cases']:,}", outcome, str(bad)


ROWS = (kills, faults, processes, fsdp, steady, lengths, bulk, nodes, fuzz)


def main() -> None:
    rows = []
    for row in ROWS:
        path = FOLDER / f"{row.__name__}.json"
        if path.exists():
            found = json.loads(path.read_text())
            script = found["command"].split()[1]  # the file has its flags
            rows.append([*row(found), f"`{script}`", f"`{path.name}`"])
    (FOLDER / "summary.md").write_text(markdown_table(HEADS, rows, left=range(len(HEADS))))
    write_json(FOLDER / "summary.json", {"rows": rows, **provenance()})


if __name__ == "__main__":
    main()
