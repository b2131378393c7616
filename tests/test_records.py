"""Where results come from, and the tables that the documents quote."""

import json
import mmap
import re
import runpy
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from hf_inti.measure import memory
from hf_inti.measure.records import command, commit, provenance, source_line
from hf_inti.measure.tables import markdown_table


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKER = re.compile(r"<!-- (results/\S+) -->\n+((?:\|.*\n)+)")
TABLES = [(path, *found) for path in DOCUMENTS for found in MARKER.findall(path.read_text())]


def test_provenance_is_complete_and_true():
    record = provenance([str(ROOT / "scripts" / "compare.py"), "costs", "--output_dir", "two words"])
    assert record["command"] == "python scripts/compare.py costs --output_dir 'two words'"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(record["date"])).total_seconds()) < 5
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["python"].startswith("3.")
    assert record["machine"]["cores"] >= 1 and record["machine"]["processor"]
    assert record["machine"]["memory_bytes"] > 2**28
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert record["commit"].removesuffix("-dirty") == head.stdout.strip() == commit().removesuffix("-dirty")
    json.dumps(record)


def test_commands_outside_the_repository_keep_their_name(tmp_path):
    assert command([str(tmp_path / "mine.py"), "--x"]) == "python mine.py --x"


def test_source_line():
    machine = {"processor": "Tortoise", "cores": 2, "gpu": None}
    record = {"command": "python x.py", "commit": "0123456789", "machine": machine, "date": "2026-11-24T01:02:03"}
    assert source_line(record) == "`python x.py`, commit 0123456, 2 cores of Tortoise, 2026-11-24."
    assert "Hare" in source_line({**record, "machine": {**machine, "gpu": "Hare"}, "commit": None})


def test_markdown_table():
    assert markdown_table(["a", "bb", "c"], [["x", "1", "text"]], left={0, 2}) == (
        "| a  | bb | c    |\n| -- | -: | ---- |\n| x  |  1 | text |\n"
    )


def test_memory_of_this_process():
    cpu = torch.device("cpu")
    before = memory.held(cpu)
    if before is None or not memory.reset_peak(cpu):
        pytest.skip("the system does not tell")
    block = mmap.mmap(-1, 2**28)  # not from malloc, which may have as much left over from other tests
    block.write(b"1" * 2**28)
    assert memory.held(cpu) - before > 2**27
    block.close()
    assert memory.peak(cpu) - before > 2**27
    memory.reset_peak(cpu)
    assert memory.peak(cpu) - before < 2**27


@pytest.mark.parametrize(("path", "result", "table"), TABLES, ids=[f"{p.name}:{r}" for p, r, _ in TABLES])
def test_tables_are_those_of_their_results(path, result, table):
    """Every marked table stands, cell by cell, in the Markdown beside its result."""
    file = ROOT / result
    record = json.loads(file.read_text())
    assert {"command", "commit", "machine", "date"} <= record.keys()
    written = file.with_suffix(".md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if "|" in line]
    for line in table.splitlines():
        quoted = [cell.strip() for cell in line.strip("|").split("|")]
        if set("".join(quoted)) <= set("-: "):
            continue
        assert quoted in cells, f"{path.name}: {line}"


def test_update_of_tables(tmp_path):
    """It replaces a table, commit and date, keeps the rest, and has nothing to do here."""
    script = runpy.run_path(ROOT / "docs" / "update_tables.py")
    for path in DOCUMENTS:
        assert script["updated"](path.read_text()) == path.read_text(), f"run docs/update_tables.py for {path.name}"
    record = {"commit": "0123456789", "date": "2026-11-24T01:02:03"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text(json.dumps(record))
    (tmp_path / "results" / "x.md").write_text("| other |\n| - |\n\n| name | ms |\n| - | - |\n| a | 2 |\n")
    script["updated"].__globals__["ROOT"] = tmp_path
    page = (
        "<!-- results/x.json -->\n| name | ms |\n| - | - |\n| a | 1 |\n\n`x`, commit COMMIT, DATE.\nMore, commit f00.\n"
    )
    wanted = page.replace("| a | 1 |", "| a | 2 |").replace("COMMIT, DATE", "0123456, 2026-11-24")
    assert script["updated"](page) == wanted
    with pytest.raises(SystemExit, match="must hold a table whose first head is 'nobody'"):
        script["updated"](page.replace("| name |", "| nobody |"))
