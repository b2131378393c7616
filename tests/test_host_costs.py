"""The papers' tables of costs of STA's and STTS's own models: as printed, and as counted."""

import re
import runpy
from pathlib import Path

import pytest

from hf_inti.benchmarks.models import count_macs
from hf_inti.comparison import host_costs
from hf_inti.papers.published import REASONS
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


# Views, as Table 2 and 3 multiply by (Sec. 4.1: the original testing), then TFLOPs.
STTS_TABLE_2 = """
MViT-B16	5	0.35
MViT-B16 T0 0.8, S4 0.9	5	0.24
MViT-B16 T0 0.9, S4 0.9	5	0.28
VideoSwin-B	12	3.38
VideoSwin-B T0 0.6	12	2.17
VideoSwin-B T0 0.8	12	3.02
"""
STTS_TABLE_3 = """
VideoSwin-B, SSv2	3	0.96
VideoSwin-B, SSv2 T0 0.6	3	0.57
VideoSwin-B, SSv2 T0 0.7	3	0.71
"""
STTS_TABLE_4 = """
MViT-B16	70.5
S0 0.6	31.2 (-55.7%)
S4 0.3	35.2 (-50.1%)
T0 0.6	41.3 (-41.4%)
T4 0.3	37.5 (-46.8%)
T0 0.8, S0 0.7	36.0 (-48.9%)
T0 0.6, S4 0.9	38.1 (-46.0%)
"""
STTS_TABLE_5 = """
0, 4	0.9, 0.7	0, 4	0.9, 0.7	35.8 (-49.2%)	76.4
4, 8	0.6, 0.4	4, 8	0.7, 0.7	36.0 (-48.9%)	76.5
0, 4, 8	0.9, 0.9, 0.7	0, 4, 8	0.9, 0.9, 0.8	36.6 (-48.1%)	76.6
0	0.6	4	0.9	37.5 (-46.8%)	77.5
"""
STTS_TABLE_7 = """
MViT-B16	70.5	79.3
T0 0.9, S4 0.9	56.4	96.5
T0 0.8, S4 0.9	47.2	112.9
T0 0.6, S4 0.9	38.1	129.7
"""
STTS_README = """
MViT T0 0.9, S4 0.9	56.4
MViT T0 0.8, S4 0.9	47.2
MViT T0 0.6, S4 0.9	38.1
MViT T0 0.5, S4 0.7	23.3
MViT T0 0.4, S4 0.6	12.1
VideoSwin T0 0.9	252.5
VideoSwin T0 0.8	223.4
VideoSwin T0 0.6	181.4
VideoSwin T0 0.5	121.6
VideoSwin T0 0.4	91.4
"""


def cells(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.strip().splitlines()]


def test_stts_tables_are_those_of_the_paper():
    two, three, four, five, seven, readme = [table.rows for table in HOST_TABLES[2:]]
    for rows, text in ((two, STTS_TABLE_2), (three, STTS_TABLE_3)):
        names = [row.model if row.method is None else f"{row.model} {row.setting}" for row in rows]
        got = [[name, str(row.views), f"{row.gflops / 1000:.2f}"] for name, row in zip(names, rows, strict=True)]
        assert got == cells(text)
    for rows, text in ((four, STTS_TABLE_4), (seven, STTS_TABLE_7)):
        names = [row.setting if row.method else row.model for row in rows]
        assert [[name, f"{row.gflops:.1f}"] for name, row in zip(names, rows, strict=True)] == [
            [line[0], line[1].split()[0]] for line in cells(text)
        ]
    for row, (*plan, gflops, _) in zip(five, cells(STTS_TABLE_5), strict=True):
        pairs = [dict(zip(*(part.split(", ") for part in plan[i : i + 2]), strict=True)) for i in (0, 2)]
        words = [f"{letter}{i} {share}" for letter, pair in zip("TS", pairs, strict=True) for i, share in pair.items()]
        assert [row.setting, f"{row.gflops:.1f}"] == [", ".join(words), gflops.split()[0]]
    names = [f"{re.sub('-B.*', '', row.model)} {row.setting}" for row in readme]
    assert [[name, str(row.gflops)] for name, row in zip(names, readme, strict=True)] == cells(STTS_README)


def test_shares_are_those_printed_but_for_rounding():
    """Each selection stands where the name says, and keeps about as much, in frames or along a side."""
    for row in (row for table in HOST_TABLES[2:] for row in table.rows if row.method):
        given = [(f"T{i}", share) for i, share in row.options["temporal"]]
        given += [(f"S{i}", share) for i, share in row.options["spatial"]]
        named = [tuple(word.split()) for word in row.setting.split(", ")]
        assert [where for where, _ in given] == [where for where, _ in named]
        for (_, share), (_, name) in zip(given, named, strict=True):
            assert share == pytest.approx(float(name), abs=0.16), row


def printed(text: str) -> dict[tuple[str, int], float]:
    """{(model, r): GFLOPs} of a table of the STA paper."""
    heads, *rows = cells(text)
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
            off = float(difference.removesuffix("%"))
            rounded = 100 * (float(counted) / float(published) - 1)
            assert off == pytest.approx(rounded, abs=0.5), (title, model, setting)
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
        ("Table 7 of the STTS paper", "MViT-B16", "T0 0.9, S4 0.9"): "56.4",
        ("Table 5 of the STTS paper", "MViT-B16", "T0 0.6, S4 0.9"): "38.5",
        ("Table 2 of the STTS paper", "VideoSwin-B", "-"): "3383.1",
    }.items():
        assert found[where] == counted, where


@pytest.mark.parametrize("name, gmacs", [("mvit_v1_b", 70.5), ("swin3d_t", 88)])
def test_operations_of_torchvisions_peers(name, gmacs):
    """As their papers print them."""
    load()
    assert count_macs({"peer": name}) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_without_torchvision(monkeypatch):
    def missing(*host):
        raise ImportError

    monkeypatch.setattr(host_costs, "build_host", missing)
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare.py"))
    for row in script["host_rows"](HOST_TABLES[1]):
        assert row[3:] == ["-", "-", "torchvision"] and "extra `hosts`" in HOST_REASONS["torchvision"]


def test_models_are_named_as_in_their_papers():
    assert all(row.model in HOST_MODELS for table in HOST_TABLES for row in table.rows)
    assert all(re.match(r"(Table \d|README) of the (STA|STTS) paper", table.title) for table in HOST_TABLES)


def test_reasons_have_names_of_their_own():
    assert not HOST_REASONS.keys() & REASONS.keys()
