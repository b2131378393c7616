"""The papers' tables of costs of STA's and STTS's own models: as printed, and as counted."""

import re
import runpy
from pathlib import Path

import pytest

from hf_inti.comparison import host_costs
from hf_inti.papers.published_hosts import HOST_MODELS, HOST_REASONS, HOST_TABLES
from torchvision_models import load


# The rows of GFLOPs, from the paper.
STA_TABLE_2 = """
Base Model	Metrics	0	32	48	64
ViT-S	GFLOPs	57	42 (-26%)	35 (-39%)	29 (-49%)
ViT-B	GFLOPs	180	136 (-24%)	116 (-36%)	96 (-47%)
ViT-L	GFLOPs	597	446 (-25%)	376 (-37%)	308 (-48%)
ViT-H	GFLOPs	1192	890 (-25%)	748 (-37%)	611 (-49%)
"""
STA_TABLE_3 = """
Base Model	Metrics	0	192	256	320
VideoSwin-T	GFLOPs	88	68 (-23%)	61 (-31%)	54 (-39%)
VideoSwin-S	GFLOPs	166	121 (-27%)	106 (-36%)	91 (-45%)
VideoSwin-B	K400 GFLOPs	282	202 (-28%)	176 (-38%)	149 (-47%)
VideoSwin-B	SSV2 GFLOPs	321	241 (-25%)	215 (-33%)	188 (-41%)
"""


def printed(text: str) -> dict[tuple[str, int], float]:
    """{(model, r): GFLOPs} of a table of the STA paper."""
    heads, *rows = [line.split("\t") for line in text.strip().splitlines()]
    found = {}
    for model, metric, *values in rows:
        name = f"{model}, SSv2" if metric.startswith("SSV2") else model
        found |= {(name, int(r)): float(value.split()[0]) for r, value in zip(heads[2:], values, strict=True)}
    return found


@pytest.mark.parametrize("number, text", [(0, STA_TABLE_2), (1, STA_TABLE_3)])
def test_sta_tables_are_those_of_the_paper(number, text):
    rows = HOST_TABLES[number].rows
    assert {(row.model, int(row.setting.split()[1])): row.gflops for row in rows} == printed(text)
    for row in rows:
        r = int(row.setting.split()[1])
        assert (row.method, row.options) == (("sta", {"r": r}) if r else (None, {}))


@pytest.fixture(scope="module")
def host_rows():
    """Of a table's title, its lines as `compare.py` prints them."""
    load()
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare.py"))
    return {table.title: script["host_rows"](table) for table in HOST_TABLES}


def test_every_row_is_within_a_percent_or_has_its_reason(host_rows):
    told = {"torchvision"}
    for title, rows in host_rows.items():
        for model, setting, published, counted, difference, why in rows:
            off = 100 * (float(counted) / float(published) - 1)
            assert float(difference.removesuffix("%")) == pytest.approx(off, abs=0.25), (title, model, setting)
            assert bool(why) == (abs(off) > 1), (title, model, setting, counted)
            told |= {why} - {""}
    assert told == set(HOST_REASONS)


def test_counts(host_rows):
    """As counted once by hand, see `test_fewer_operations_by_hand` of the hosts."""
    found = {(title.split(":")[0], *row[:2]): row[3] for title, rows in host_rows.items() for row in rows}
    for where, counted in {
        ("Table 2 of the STA paper", "ViT-B", "r 0"): "180.5",
        ("Table 2 of the STA paper", "ViT-B", "r 64"): "96.5",
        ("Table 3 of the STA paper", "VideoSwin-S", "r 0"): "166.1",
        ("Table 3 of the STA paper", "VideoSwin-S", "r 256"): "106.4",
        ("Table 3 of the STA paper", "VideoSwin-B, SSv2", "r 320"): "188.1",
    }.items():
        assert found[where] == counted, where


def test_without_torchvision(monkeypatch):
    def missing(*host):
        raise ImportError

    monkeypatch.setattr(host_costs, "build_host", missing)
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare.py"))
    for row in script["host_rows"](HOST_TABLES[1]):
        assert row[3:] == ["-", "-", "torchvision"] and "extra `hosts`" in HOST_REASONS["torchvision"]


def test_models_are_named_as_in_their_papers():
    assert all(row.model in HOST_MODELS for table in HOST_TABLES for row in table.rows)
    assert all(re.match(r"Table \d of the (STA|STTS) paper", table.title) for table in HOST_TABLES)
