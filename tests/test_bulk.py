"""Bulk inference: what is listed, decoded, computed and written, and that nothing is lost or done twice."""

import io
import itertools
import json
import os
import random
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from misbehaving import WITH_STAGES, Misbehaves
from ray_nodes import Nodes, environment, wait_for

from conftest import TINY, write_video
from forks import ALL, Fork, run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.benchmarks import bulk as benchmark
from hf_inti.bulk import isolation
from hf_inti.bulk.decoding import ClipDecoder
from hf_inti.bulk.engine import cluster, make_plan
from hf_inti.bulk.isolation import Died, Isolated
from hf_inti.bulk.model import ClipModel, Result
from hf_inti.bulk.run import retry_broken
from hf_inti.bulk.shards import Shards
from hf_inti.data.unlabelled import Clip, find_clips, read_shard
from hf_inti.training.checkpoints import load_classifier


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "bulk.py"
LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model/, 4 videos and a broken one in videos/, and 3 others in shards/clips-0.tar and clips-1.tar."""
    folder = tmp_path_factory.mktemp("bulk")
    torch.manual_seed(0)
    config = InTIClipVisionConfig(**TINY, num_frames=8, num_labels=3, id2label=dict(enumerate(LABELS)))
    InTIClipForVideoClassification(config).save_pretrained(folder / "model")
    size = {"height": 32, "width": 32}
    processor = InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(folder / "model")
    for i in range(7):
        write_video(folder / ("videos" if i < 4 else "loose") / f"{i}.mp4", frames=10 + i, seed=i)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    (folder / "shards").mkdir()
    for i in (4, 5, 6):
        with tarfile.open(folder / "shards" / f"clips-{i % 2}.tar", "a") as tar:
            tar.add(folder / "loose" / f"{i}.mp4", f"{i}.mp4")
            tar.add(__file__, f"{i}.txt")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_classifier(str(folder / "model"))


@pytest.fixture(scope="module")
def expected(folder, loaded) -> dict[str, torch.Tensor]:
    """The features of all seven, by the name of the file."""
    model, processor = loaded
    found = {}
    for path in [*folder.glob("videos/[0-9].mp4"), *folder.glob("loose/*.mp4")]:
        pixel_values = processor(str(path), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found[path.name] = model.vision_model(pixel_values).pooler_output[0]
    return found


def rows_of(output: Path) -> list[dict]:
    return [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def write_tar(path: Path, *names: str) -> bytearray:
    """A tar of small files, which it returns: a header every 1,024 bytes, then zeros."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 100
            tar.addfile(info, io.BytesIO(b"x" * 100))
    return bytearray(path.read_bytes())


# Listing ------------------------------------------------------------------------------------------


def test_files_folders_urls_and_shards(folder):
    places = [folder / "videos", folder / "videos" / "2.mp4", "https://a.org/b.mp4", folder / "gone.mp4"]
    clips = find_clips([*map(str, places), str(folder / "shards")])
    shards = folder / "shards"
    assert [clip.video for clip in clips] == [
        *(str(folder / "videos" / f"{name}.mp4") for name in (0, 1, 2, 3, "broken")),
        "https://a.org/b.mp4",
        str(folder / "gone.mp4"),
        *(f"{shards}/clips-{k}.tar/{i}.mp4" for k, i in ((0, 4), (0, 6), (1, 5))),
    ]
    clip = clips[-1]
    with open(clip.path, "rb") as file:
        file.seek(clip.offset)
        assert file.read(clip.size) == (folder / "loose" / "5.mp4").read_bytes()
    for pattern in ("clips-{0..1}.tar", "clips-*.tar", "clips-[01].tar"):
        assert find_clips([str(shards / pattern)]) == clips[-3:], pattern


def test_ids_do_not_depend_on_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder / "videos")
    assert find_clips(["0.mp4"]) == find_clips([str(folder / "videos" / "0.mp4")])


@pytest.mark.parametrize("kind", ["txt", "csv", "json", "jsonl", "parquet"])
def test_lists(folder, tmp_path, kind):
    names = ["videos/1.mp4", "https://a.org/b.mp4", str(folder / "videos" / "0.mp4"), "videos/1.mp4"]
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"n": range(4), "place": names}), path)
    elif kind == "jsonl":
        path.write_text("".join(f'{{"place": "{name}"}}\n' for name in names))
    elif kind == "json":
        path.write_text("[" + ", ".join(f'{{"place": "{name}"}}' for name in names) + "]")
    else:
        path.write_text("\n".join([*(["place"] if kind == "csv" else []), *names]))
    clips = find_clips([str(path)], "place", str(folder))
    wanted = [str(folder / "videos" / "1.mp4"), "https://a.org/b.mp4", str(folder / "videos" / "0.mp4")]
    assert [clip.video for clip in clips] == wanted


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/secret.mp4", "videos/../../secret.mp4"])
def test_lists_stay_in_their_root(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"{name}\n")
    with pytest.raises(ValueError, match=f"must be in video_root, {tmp_path}, got {name}"):
        find_clips([str(tmp_path / "list.txt")])
    assert len(find_clips([str(tmp_path / "list.txt")], allow_outside_root=True)) == 1


@pytest.mark.parametrize(
    "place, message",
    [
        ("s3://bucket/a.mp4", "must start with http:// or https://, got s3://bucket/a.mp4"),
        ("{tmp}/none.tar", "must name tar shards"),
        ("{tmp}/x-{{0..2}}.tar", "must name tar shards, got no file .*x-1.tar; correct"),
        ("{tmp}/x-{{0..2}}*.tar", "must name tar shards, got no file .*x-1\\*.tar; correct"),
        ("{tmp}/x-{{2..0}}.tar", "must name tar shards"),
        ("{tmp}/empty", "holds no videos"),
        ("{tmp}/list.csv", "must have a column 'video', got \\['name'\\]"),
        ("{tmp}/list.jsonl", "must give a path or URL for every video, got None"),
    ],
)
def test_places_that_hold_nothing(tmp_path, place, message):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "x-0.tar", "0.mp4")
    write_tar(tmp_path / "x-2.tar", "2.mp4")
    (tmp_path / "list.csv").write_text("name\na.mp4\n")
    (tmp_path / "list.jsonl").write_text('{"video": "a.mp4"}\n{"video": null}\n')
    with pytest.raises(ValueError, match=message):
        find_clips([place.format(tmp=tmp_path)])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.json", '[{"video": "a.mp4"}, "b.mp4"]', "must hold an object for every video, got 'b.mp4' for video 2"),
        ("l.jsonl", '{"video": "a.mp4"}\n3\n', "must hold an object for every video, got 3 for video 2"),
        ("l.jsonl", '{"video": "a.mp4"}\nnull\n', "must hold an object for every video, got None for video 2"),
        ("l.jsonl", '{"video": {"path": "a.mp4"}}\n', "must give a path or URL for every video, got {.*} for video 1"),
        ("l.json", '[{"video": "a.mp4"}, {"n": 1}]', "must give a path or URL for every video, got None for video 2"),
        ("l.json", "[" * 100_000, "must be valid JSON, got .*recursion"),
        ("l.csv", "video\na.mp4\n" + "b" * 200_000, "must be a csv, got field larger than .* in line 'bbb.*; shorten"),
        ("l.csv", "b" * 200_000 + "\na.mp4", "must be a csv, got field larger than .* in line 'bbb.*; shorten"),
        ("l.parquet", ["a.mp4", None], "must give a path or URL for every video, got None for video 2; fix"),
        ("l.parquet", [1], "must give a path or URL for every video, got 1 for video 1; fix"),
        ("l.parquet", [["a.mp4"]], "must give a path or URL for every video, got \\['a.mp4'\\] for video 1; fix"),
        ("l.parquet", "no table", "must be a Parquet file with one column of each name, got: .*write it again"),
    ],
)
def test_lists_with_a_bad_row(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        pq.write_table(pa.table({"video": content}), path)
    with pytest.raises(ValueError, match=f"^{path} {message}") as error:
        find_clips([str(path)])
    assert len(str(error.value)) < 500


def test_a_shard_that_is_cut_off(folder, tmp_path):
    whole = (folder / "shards" / "clips-0.tar").read_bytes()
    second = find_clips([str(folder / "shards" / "clips-0.tar")])[1]
    (tmp_path / "cut.tar").write_bytes(whole[: second.offset + 600])
    (tmp_path / "other.tar").write_bytes(b"no tar")
    first, end, other = find_clips([str(tmp_path)])
    assert first.error is None and "unexpected end of data" in end.error
    assert end.video == str(tmp_path / "cut.tar") and other.video == str(tmp_path / "other.tar") and other.error
    decode = ClipDecoder(InTIClipVideoProcessor.from_pretrained(folder / "model"), Result("features", 48))
    assert decode(first._asdict())["error"] is None
    assert decode(end._asdict())["error"] == end.error
    cut = second._replace(path=end.path)  # since it was listed
    assert "cut off" in decode(cut._asdict())["error"]


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "cut in a header", "a page of zeros", "put together"])
def test_a_shard_that_ends_too_early(tmp_path, damage):
    """tarfile takes all of these for the end."""
    path = tmp_path / "s.tar"
    data = write_tar(path, *(f"{i}.mp4" for i in range(8)))
    data[1024] ^= damage == "flipped bit"
    if damage == "a page of zeros":
        data[1024:5120] = bytes(4096)
    end = {"cut": 1024, "cut in a header": 1100}.get(damage, len(data))
    path.write_bytes(data[:end] * (2 if damage == "put together" else 1))
    *clips, last = find_clips([str(path)])
    assert len(clips) == (8 if damage == "put together" else 1) and not any(clip.error for clip in clips)
    at = 8 * 1024 if damage == "put together" else 1024
    assert last.video == str(path) and f"must end in zeros, got others or nothing at byte {at}" in last.error


def set_size(data: bytearray, header: int, size: int) -> None:
    """Write a base-256 size, as numbers that octal digits have no room for."""
    data[header + 124 : header + 136] = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, signed=True)
    data[header + 148 : header + 156] = b"%06o\0 " % tarfile.calc_chksums(data[header : header + 512])[0]


@pytest.mark.parametrize("kind", [b"0", b"S", b"L", b"x"], ids=["file", "sparse", "long name", "pax"])
@pytest.mark.parametrize("size", [-512, -1024, -(2**70), 5000, 2**40, 2**63, 2**70])
def test_a_shard_with_impossible_sizes(tmp_path, kind, size):
    """Some made tarfile read the same headers for ever (CVE-2025-8194)."""
    path = tmp_path / "s.tar"
    data = write_tar(path, *(f"{i}.mp4" for i in range(3)))
    data[1024 + 156 : 1024 + 157] = kind
    set_size(data, 1024, size)
    path.write_bytes(data[:4096])
    clips = list(itertools.islice(read_shard(str(path)), 10))
    assert [clip.video for clip in clips] == [f"{path}/0.mp4", str(path)] and clips[-1].error


def test_a_shard_with_a_sparse_file(tmp_path):
    """Its bytes are not in one piece, and its size, which is not that in the shard, may be anything."""
    data = write_tar(tmp_path / "s.tar", "0.mp4", "1.mp4")
    data[156:157] = b"S"
    data[483:495] = b"\x80" + (2**70).to_bytes(11)
    set_size(data, 0, 100)
    (tmp_path / "s.tar").write_bytes(data)
    first, second = find_clips([str(tmp_path / "s.tar")])
    assert "pack it without --sparse" in first.error and first.size == -1 and second.error is None


def test_a_shard_with_headers_for_headers(tmp_path):
    """tarfile calls itself for each of them."""
    path = tmp_path / "s.tar"
    data = write_tar(path, "0.mp4", *["name"] * 2000)
    for i in range(1, 2001):
        data[i * 1024 + 156 : i * 1024 + 157] = b"L"
        set_size(data, i * 1024, 100)
    path.write_bytes(data)
    first, last = find_clips([str(path)])
    assert first.error is None and "recursion" in last.error


@pytest.mark.parametrize("zeros", [512, 1024, 10240])
def test_shards_of_several_writers(tmp_path, zeros):
    data = write_tar(tmp_path / "s.tar", "0.mp4", "1.mp4")
    (tmp_path / "s.tar").write_bytes(data[:2048] + bytes(zeros))
    assert [clip.error for clip in find_clips([str(tmp_path / "s.tar")])] == [None, None]


def test_names_that_are_not_utf8(folder, loaded, tmp_path):
    """Arrow has no such strings. In a shard they are only ids; what must be opened by them is to be renamed."""
    name = os.fsdecode(b"caf\xe9")
    for path in (tmp_path / f"{name}.mp4", tmp_path / name / "0.mp4"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / "loose" / "4.mp4").read_bytes())
    for path in (tmp_path / "s.tar", tmp_path / f"{name}.tar"):
        with tarfile.open(path, "w") as tar:
            tar.add(folder / "loose" / "4.mp4", f"{name}.mp4")
    (tmp_path / "list.json").write_text(json.dumps([{"video": f"{name}.mp4"}, {"video": f"https://a.org/{name}"}]))
    clips = find_clips([str(tmp_path), str(tmp_path / "list.json")])
    shown = ["caf\\udce9.mp4", "caf\\udce9/0.mp4", "https://a.org/caf\\udce9", "caf\\udce9.tar", "s.tar/caf\\udce9.mp4"]
    assert sorted(clip.video.removeprefix(f"{tmp_path}/") for clip in clips) == sorted(shown)
    pa.Table.from_pylist([clip._asdict() for clip in clips])  # as Ray does
    decode = ClipDecoder(loaded[1], Result("features", 48))
    good = next(clip for clip in clips if "s.tar" in clip.video)
    for clip in clips:
        error = decode(clip._asdict())["error"]
        assert error is None if clip == good else "must be UTF-8, got another encoding; rename" in error


# Decoding and computing ---------------------------------------------------------------------------


@pytest.mark.parametrize("output, views", [("features", (1, 1)), ("features", (2, 3)), ("scores", (1, 3))])
def test_rows_are_what_the_model_says(folder, loaded, output, views):
    model, processor = loaded
    result = Result(output, 3 if output == "scores" else 48, LABELS, *views)
    clips = find_clips([str(folder / "videos"), str(folder / "shards")])
    decode, compute = ClipDecoder(processor, result), ClipModel(model, processor, result, 1)
    table = compute(pa.Table.from_pylist([decode(clip._asdict()) for clip in clips]))
    assert table.schema == result.schema()
    rows = {Path(row["video"]).name: row for row in table.to_pylist()}
    broken = rows.pop("broken.mp4")
    assert broken["error"].startswith("not a video") and all(
        broken[name] is None for name in broken.keys() - {"video", "error"}
    )
    assert len(rows) == 7
    for name, row in rows.items():
        path = next(folder.glob(f"*/{name}"))
        pixel_values = processor(str(path), num_clips=views[0], num_crops=views[1])["pixel_values"]
        with torch.inference_mode():
            tower = model.vision_model(pixel_values.flatten(0, -5)).pooler_output
            wanted = (model.classifier(tower).softmax(-1) if output == "scores" else tower).mean(0)
        assert row["error"] is None
        torch.testing.assert_close(torch.tensor(row[output]), wanted, rtol=1e-5, atol=1e-6)
        if output == "scores":
            assert row["prediction"] == LABELS[wanted.argmax()] and row["score"] == max(row["scores"])


def test_clips_of_several_shapes(loaded):
    """Without a crop each video keeps its own shape."""
    model, processor = loaded
    compute = ClipModel(model, processor, Result("features", 48), 1)
    clips = [torch.randint(0, 256, (views, 8, 3, 32, 32), dtype=torch.uint8) for views in (1, 2, 1)]
    alone = [compute.predict([clip])[0] for clip in clips]
    torch.testing.assert_close(compute.predict(clips), torch.stack(alone))


def test_private_addresses_are_refused(loaded):
    decode = ClipDecoder(loaded[1], Result("features", 48))
    for host in ("127.0.0.1:9", "169.254.169.254", "localhost", "[::1]"):
        row = decode(Clip(f"http://{host}/a.mp4", f"http://{host}/a.mp4")._asdict())
        assert "must be on the public internet" in row["error"] and not row["frames"]


@pytest.mark.slow
def test_a_clip_that_takes_the_process_with_it(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    call = Isolated(Misbehaves)
    first = call("work")
    assert call("work") == first != os.getpid()
    with pytest.raises(Died, match="^died$"):
        call("crash")
    second = call("work")
    assert second != first
    with pytest.raises(Died, match="^died$"):
        call("fill")
    second = call("work")
    monkeypatch.setattr(isolation, "SECONDS", 0.2)
    with pytest.raises(Died, match="took more than 0.2 s"):
        call("hang")
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
    call.close()
    for made, reason in ((Isolated(Misbehaves, "extra"), "TypeError: Misbehaves"), (Isolated(os._exit, 3), "its end")):
        for _ in range(2):  # nor does it say of the second clip that this killed it
            with pytest.raises(RuntimeError, match=f"^the process that decodes must start, .*{reason}"):
                made("work")


# Shards -------------------------------------------------------------------------------------------

SCHEMA = Result("features", 2).schema()
SETTINGS = {"model": "one", "labels": ["a"]}


def table(*videos: str, error: str | None = None) -> pa.Table:
    rows = [{"video": video, "error": error, "features": None if error else [1.0, 2.0]} for video in videos]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_shards_are_whole_or_not_there(tmp_path, monkeypatch):
    with Shards(tmp_path, SCHEMA, SETTINGS, 2) as shards:
        shards.add(table("a"))
        assert not rows_of(tmp_path)
        shards.add(table("b"))
        assert [row["video"] for row in rows_of(tmp_path)] == ["a", "b"]
        shards.add(table("c", error="bad"))
    assert [path.name for path in sorted(tmp_path.glob("*.parquet"))] == [
        "shard_000000.parquet",
        "shard_000001.parquet",
    ]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)  # after the shard was written, before it has its name
        with Shards(tmp_path, SCHEMA, SETTINGS, 1) as shards:
            shards.add(table("d"))
    assert len(rows_of(tmp_path)) == 3 and list(tmp_path.glob("*.part"))
    assert len(pq.read_table(tmp_path)) == 3  # as during a run
    (tmp_path / "film.part").touch()  # not a run's
    with Shards(tmp_path, SCHEMA, SETTINGS, 1) as shards:
        assert shards.done == {"a": None, "b": None, "c": "bad"}
    assert [path.name for path in tmp_path.glob("*.part")] == ["film.part"]


@pytest.mark.parametrize("name", ["mine.parquet", "part-0.parquet", "shard_7_old.parquet", "part_7.parquet"])
def test_shards_are_known_by_their_content(tmp_path, name):
    with Shards(tmp_path, SCHEMA, SETTINGS, 1) as shards:
        shards.add(table("a"))
        shards.add(table("b"))
    (tmp_path / "shard_000000.parquet").rename(tmp_path / name)
    with Shards(tmp_path, SCHEMA, SETTINGS, 1) as shards:
        assert set(shards.done) == {"a", "b"}
        shards.add(table("a", "c"))
    assert sorted(row["video"] for row in rows_of(tmp_path)) == ["a", "b", "c"]
    names = [path.name for path in tmp_path.glob("*.parquet")]
    assert sorted(names) == sorted([name, "shard_000001.parquet", "shard_000002.parquet"])


def test_broken_ones_are_tried_again(tmp_path):
    with Shards(tmp_path, SCHEMA, SETTINGS, 2) as shards:
        shards.add(table("a"))
        shards.add(table("b", error="bad"))
        shards.add(table("c", error="bad"))
    with Shards(tmp_path, SCHEMA, SETTINGS, 2) as shards:
        shards.forget_broken({"a", "b", "d"})
        assert set(shards.done) == {"a", "c"}
    assert sorted(row["video"] for row in rows_of(tmp_path)) == ["a", "c"]
    with Shards(tmp_path, SCHEMA, SETTINGS, 2) as shards:  # what is left are shards of these settings
        assert shards.done == {"a": None, "c": "bad"}
        shards.forget_broken({"c"})
        assert shards.done == {"a": None}


def test_a_mended_shard_is_tried_again(tmp_path):
    """The row of a tar that could not be read is that of no clip in it."""
    data = write_tar(tmp_path / "s.tar", "0.mp4", "1.mp4")
    (tmp_path / "s.tar").write_bytes(data[:1024])
    with Shards(tmp_path / "out", SCHEMA, SETTINGS, 2) as shards:
        for clip in find_clips([str(tmp_path / "s.tar")]):
            shards.add(table(clip.video, error=clip.error))
        assert set(shards.done) == {str(tmp_path / "s.tar"), str(tmp_path / "s.tar" / "0.mp4")}
        (tmp_path / "s.tar").write_bytes(data)
        shards.flush()
        retry_broken(shards, find_clips([str(tmp_path / "s.tar")]))
        assert set(shards.done) == {str(tmp_path / "s.tar" / "0.mp4")}


def test_shards_that_do_not_fit(tmp_path):
    with Shards(tmp_path, SCHEMA, SETTINGS, 2) as shards:
        shards.add(table("a"))
        with pytest.raises(ValueError, match="must have one run at a time"):
            Shards(tmp_path, SCHEMA, SETTINGS, 2).__enter__()
    with pytest.raises(ValueError, match="must have been written with model two, got one in .*shard_000000.parquet"):
        Shards(tmp_path, SCHEMA, {**SETTINGS, "model": "two"}, 2).__enter__()
    path = tmp_path / "shard_000000.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="shard_000000.parquet must be a whole shard, .*; delete it"):
        Shards(tmp_path, SCHEMA, SETTINGS, 2).__enter__()
    pq.write_table(pa.table({"video": ["a"]}), path)
    with pytest.raises(ValueError, match="must have been written with model one, got None"):
        Shards(tmp_path, SCHEMA, SETTINGS, 2).__enter__()


def test_plans():
    assert make_plan({"CPU": 2, "machines": 1})[:4] == (1, 1, 2, 0)
    assert make_plan({"CPU": 1, "machines": 1})[:4] == (1, 1, 1, 0)
    assert make_plan({"CPU": 8, "machines": 2})[:4] == (2, 6, 4, 0)
    assert make_plan({"CPU": 64, "GPU": 8, "machines": 1}) == (8, 64, 8, 1.0, 8)
    assert make_plan({"CPU": 64, "GPU": 2, "machines": 1}, models=4, decoders=3, batch_size=2) == (4, 3, 16, 0.5, 2)


@pytest.mark.slow
def test_without_ray(folder, tmp_path):
    code = (
        "import runpy, sys; sys.modules['ray'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    flags = (SCRIPT, folder / "model", folder / "videos", "--output_dir", tmp_path)
    status, _, error = run_in_a_fork(code, *flags, imported=ALL)
    assert status == 1 and "pip install 'hf_inti[bulk]'" in error and error.startswith("error: ")


def test_the_benchmark_leaves_starts_and_ends_out(monkeypatch):
    clock = [0.0]

    def run_stages(clips, *stages):
        clock[0] += 7  # Ray starts
        for _ in range(0, len(clips), 8):
            clock[0] += 8 * 0.25
            yield None
        clock[0] += 3  # and stops

    monkeypatch.setattr(benchmark, "run_stages", run_stages)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    assert benchmark.time_stages([Clip(str(i), str(i)) for i in range(96)], (None, None), None) == pytest.approx(0.25)


# With Ray -----------------------------------------------------------------------------------------

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[bulk]'")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("ray"), count=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in nodes.variables.items():
                patch.setenv(name, value)
            yield nodes
    finally:
        nodes.stop()


@with_ray
def test_workers_of_a_private_cluster_are_not_nice(monkeypatch):
    import ray

    def init(**options):
        raise RuntimeError(f"niceness {os.environ['RAY_worker_niceness']}")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_worker_niceness", "")
    monkeypatch.delenv("RAY_worker_niceness")
    with pytest.raises(RuntimeError, match="niceness 0"), cluster(None):
        pass


@pytest.mark.slow
@with_ray
def test_two_nodes_a_kill_and_a_longer_list(folder, expected, nodes, tmp_path):
    """Killed when some shards are written, started again with more videos: each video once, computed once."""
    flags = ("--output_dir", tmp_path, "--output", "features", "--shard_rows", 1, "--ray_address", nodes.address)
    place = {"imported": ALL, "environment": environment()}
    good = [folder / "videos" / f"{i}.mp4" for i in range(4)]
    stages = json.dumps([["Echo"], ["Zeros", TINY["hidden_size"], 1.5]])
    killed = Fork(WITH_STAGES, stages, SCRIPT, folder / "model", *good, *flags, "--models", 1, "--decoders", 4, **place)
    wait_for(lambda: list(tmp_path.glob("*.parquet")), [killed])
    time.sleep(random.uniform(0, 0.5))
    killed.kill()
    killed.end()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    kept = {row["video"] for row in rows_of(tmp_path)}
    assert 0 < len(kept) < 4
    places = (folder / "videos", folder / "shards")
    status, printed, errors = run_in_a_fork(SCRIPT, folder / "model", *places, *flags, **place)
    assert status == 0, errors
    assert "8 videos are in" in printed and "1 of them broken" in printed
    assert "1 broken videos" in errors and f"{folder / 'videos' / 'broken.mp4'}: not a video" in errors
    assert all(path.read_bytes() == data for path, data in before.items())
    rows = rows_of(tmp_path)
    assert sorted(Path(row["video"]).name for row in rows) == [*(f"{i}.mp4" for i in range(7)), "broken.mp4"]
    for row in rows:
        if row["video"] in kept:
            assert not any(row["features"])
        elif row["error"] is None:
            wanted = expected[Path(row["video"]).name]
            torch.testing.assert_close(torch.tensor(row["features"]), wanted, rtol=1e-5, atol=1e-6)
        else:
            assert row["features"] is None and row["video"].endswith("broken.mp4")


@pytest.mark.slow
@with_ray
def test_a_model_that_fails_stops_the_run(folder, nodes, tmp_path):
    """Not a broken video: one line says why."""
    flags = ("--output_dir", tmp_path, "--ray_address", nodes.address, "--models", 1, "--batch_size", 1)
    stages = json.dumps([["Echo"], ["Refuses"]])
    places = (folder / "model", folder / "videos")
    status, _, error = run_in_a_fork(WITH_STAGES, stages, SCRIPT, *places, *flags, imported=ALL)
    reason = "the crop must be 32, got 16 in 1 videos; if memory is short, a smaller batch_size may do."
    assert status == 1 and error.splitlines()[-1] == f"error: every stage must work, got ValueError: {reason}", error
    assert not rows_of(tmp_path)


@pytest.mark.slow
@with_ray
def test_models_spread_over_the_nodes(nodes):
    code = """
import sys
from collections import Counter
from hf_inti.bulk.engine import Stage, cluster, make_plan, run_stages
from hf_inti.data.unlabelled import Clip
from misbehaving import Echo, Where

clips = [Clip(str(i), str(i)) for i in range(160)]
with cluster(sys.argv[1]) as resources:
    tables = run_stages(clips, Stage(Echo, ()), Stage(Where, ()), make_plan(resources, models=4))
    places = {(row["node"], row["process"]) for table in tables for row in table.to_pylist()}
print(*Counter(node for node, _ in places).values())
"""
    status, printed, errors = run_in_a_fork(code, nodes.address, imported=ALL, environment=environment())
    assert (status, printed.split()) == (0, ["2", "2"]), errors


@pytest.mark.slow
@with_ray
def test_a_node_dies(folder, nodes, tmp_path):
    """What it had is computed by the other. The last test of the cluster, which then has one node."""
    flags = ("--output_dir", tmp_path, "--output", "features", "--shard_rows", 1, "--ray_address", nodes.address)
    stages = json.dumps([["Echo"], ["Zeros", TINY["hidden_size"], 1.5]])
    places = (folder / "model", folder / "videos", folder / "shards")
    run = Fork(WITH_STAGES, stages, SCRIPT, *places, *flags, "--models", 2, imported=ALL, environment=environment())
    wait_for(lambda: any("Model" in name for name in nodes.stages_of_last()), [run])
    nodes.kill_last()
    status, printed, errors = run.end()
    assert status == 0, errors
    names = [*(f"{i}.mp4" for i in range(7)), "broken.mp4"]
    assert sorted(Path(row["video"]).name for row in rows_of(tmp_path)) == names
