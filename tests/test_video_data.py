"""Datasets from every layout, and clips that do not depend on workers, processes, order or broken files."""

import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from hf_inti.data import clips as clips_module
from hf_inti.data.clips import BadVideos, StreamingVideoClips, VideoClips, cache_frames, collate
from hf_inti.data.datasets import align_labels, label_names_of, load_video_dataset
from hf_inti.model.video_decoding import VideoDecodingError, VideoReader


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def make_video(path, frames=8, size=(32, 24), level=100):
    """A video whose frame t is all of grey level `level + 5 t`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            image = np.full((size[1], size[0], 3), level + 5 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a video")


def decode(video):
    """All frames of a row's video, uint8 (T, 3, h, w)."""
    source = video["path"] if video["bytes"] is None else video["bytes"]
    with VideoReader(source) as reader:
        return torch.stack(reader.read(range(reader.num_frames))).permute(0, 3, 1, 2)


def transform(video, generator):
    """Two frames chosen at random, and a random number that tells draws apart."""
    frames = video if torch.is_tensor(video) else decode(video)
    chosen = torch.randint(len(frames), (2,), generator=generator)
    return {"pixel_values": frames[chosen], "noise": torch.rand((), generator=generator)}


def rows(dataset, root):
    """{path below root: class name}."""
    names = label_names_of(dataset)
    return {os.path.relpath(row["video"]["path"], root): names[row["label"]] for row in dataset}


# Layouts ------------------------------------------------------------------------------------------


def test_folder_takes_all_extensions_and_leaves_other_files_out(tmp_path):
    kept = ["b/x.mp4", "b/deep/er/y.WEBM", "a/z.avi", "a/q.Mov", "a/r.3gp", "a/n.ogv"]
    touch(*(tmp_path / name for name in [*kept, "a/.hidden.mp4", "a/notes.txt", ".git/x.mp4", "b/.tmp/x.mp4"]))
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    dataset = load_video_dataset(tmp_path)
    assert rows(dataset, tmp_path) == {name: name[0] for name in kept}
    assert len(dataset) == len(kept)
    assert label_names_of(dataset) == ["a", "b"]
    assert dataset.features["video"] == datasets.Video(decode=False)
    assert dataset[0]["video"]["bytes"] is None


def test_folder_follows_links(tmp_path):
    touch(tmp_path / "store" / "x.mp4")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "x.mp4").symlink_to(tmp_path / "store" / "x.mp4")
    (tmp_path / "root" / "a" / "sub").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "store")
    found = rows(load_video_dataset(tmp_path / "root"), tmp_path / "root")
    assert found == {"a/x.mp4": "a", "a/sub/x.mp4": "a", "b/x.mp4": "b"}


def test_folder_splits_share_their_numbering(tmp_path):
    touch(*(tmp_path / name for name in ("train/a/1.mp4", "train/b/2.mp4", "validation/b/3.mp4")))
    validation = load_video_dataset(tmp_path, split="val")
    assert rows(load_video_dataset(tmp_path), tmp_path) == {"train/a/1.mp4": "a", "train/b/2.mp4": "b"}
    assert rows(validation, tmp_path) == {"validation/b/3.mp4": "b"}
    assert validation[0]["label"] == 1
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation'\] for .*, got 'test'"):
        load_video_dataset(tmp_path, split="test")


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path / "train" / "1.mp4", tmp_path / "plane" / "2.mp4")
    assert rows(load_video_dataset(tmp_path, split="test"), tmp_path) == {
        "train/1.mp4": "train",
        "plane/2.mp4": "plane",
    }


def test_folder_with_given_names(tmp_path):
    touch(tmp_path / "a" / "1.mp4", tmp_path / "b" / "2.mp4")
    assert load_video_dataset(tmp_path, label_names=["c", "b", "a"])["label"][:] == [2, 1]
    with pytest.raises(ValueError, match=r"labels must be among the 2 classes .*, got \['b'\];"):
        load_video_dataset(tmp_path, label_names=["a", "c"])


def test_folder_without_videos_says_what_was_looked_for(tmp_path):
    touch(tmp_path / "a" / "notes.txt")
    with pytest.raises(ValueError, match=r"must hold videos in .*<class>/\*\*/\*\.\(mp4\|webm.*, got none") as error:
        load_video_dataset(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_kinetics(tmp_path):
    path = tmp_path / "val.csv"
    lines = ["riding a bike,-abc,7,17,validate", "yoga,x_y,120,130,validate", "yoga,gone,0,10,validate"]
    path.write_text("\n".join(["label,youtube_id,time_start,time_end,split", *lines]) + "\n")
    touch(tmp_path / "v" / "riding_a_bike" / "-abc_000007_000017.mp4", tmp_path / "v" / "x_y_000120_000130.mp4")
    assert rows(load_video_dataset(path, video_root=tmp_path / "v"), tmp_path / "v") == {
        "riding_a_bike/-abc_000007_000017.mp4": "riding a bike",
        "x_y_000120_000130.mp4": "yoga",
        "gone_000000_000010.mp4": "yoga",
    }
    with pytest.raises(ValueError, match="video_root must hold the listed videos") as error:
        load_video_dataset(path)
    assert "-abc_000007_000017.mp4 and " in str(error.value)


def test_kinetics_file_of_several_splits(tmp_path):
    path = tmp_path / "k.csv"
    path.write_text("label,youtube_id,time_start,time_end,split\na,u,0,10,train\nb,v,0,10,validate\n")
    touch(tmp_path / "u_000000_000010.mp4", tmp_path / "v_000000_000010.mp4")
    assert rows(load_video_dataset(path, split="validation"), tmp_path) == {"v_000000_000010.mp4": "b"}
    with pytest.raises(ValueError, match="split must be one of .*, got 'test'"):
        load_video_dataset(path, split="test")


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_plain_list_of_indices(tmp_path, separator):
    (tmp_path / "list.txt").write_text(f"a b/1.mp4{separator}2\n\nc.WEBM{separator}0\na b/1.mp4{separator}2\n")
    touch(tmp_path / "a b" / "1.mp4", tmp_path / "c.WEBM")
    dataset = load_video_dataset(tmp_path / "list.txt")
    assert [os.path.relpath(row["video"]["path"], tmp_path) for row in dataset] == [
        "a b/1.mp4",
        "c.WEBM",
        "a b/1.mp4",
    ]
    assert dataset["label"][:] == [2, 0, 2] and label_names_of(dataset) == ["0", "1", "2"]
    assert label_names_of(load_video_dataset(tmp_path / "list.txt", label_names=["x", "y", "z"])) == [
        "x",
        "y",
        "z",
    ]
    with pytest.raises(ValueError, match=r"labels must be among the 2 classes .*, got \[2\];"):
        load_video_dataset(tmp_path / "list.txt", label_names=["x", "y"])


def test_plain_list_of_names(tmp_path):
    (tmp_path / "list.csv").write_text("1.mp4,riding a bike\n/abs/2.mp4,yoga\n")
    touch(tmp_path / "1.mp4")
    with pytest.raises(ValueError, match="must be in video_root, .*, got /abs/2.mp4; set video_root"):
        load_video_dataset(tmp_path / "list.csv")
    dataset = load_video_dataset(tmp_path / "list.csv", allow_outside_root=True)
    assert [row["video"]["path"] for row in dataset] == [str(tmp_path / "1.mp4"), "/abs/2.mp4"]
    assert label_names_of(dataset) == ["riding a bike", "yoga"]


@pytest.mark.parametrize("name", ["../secret.mp4", "a/../../secret.mp4", "{}/secret.mp4", "{}/lists2/1.mp4"])
def test_lists_stay_in_their_root(name, tmp_path):
    touch(tmp_path / "secret.mp4", tmp_path / "lists2" / "1.mp4", tmp_path / "lists" / "a" / "1.mp4")
    name = name.format(tmp_path)
    (tmp_path / "lists" / "list.csv").write_text(f"a/1.mp4,yoga\n{name},yoga\n")
    (tmp_path / "lists" / "list.jsonl").write_text(json.dumps({"video": name, "label": "yoga"}))
    for source in ("list.csv", "list.jsonl"):
        with pytest.raises(ValueError, match="listed videos must be in video_root"):
            load_video_dataset(tmp_path / "lists" / source)
        assert len(load_video_dataset(tmp_path / "lists" / source, allow_outside_root=True))
    if name.startswith("/"):
        assert len(load_video_dataset(tmp_path / "lists" / "list.jsonl", video_root=tmp_path)) == 1


def test_lists_name_files_and_no_urls(tmp_path):
    """What opens URLs takes "a::b" apart and reads a, wherever it lies, so the whole need not lead out of the root."""
    touch(tmp_path / "lists" / "1.mp4")
    (tmp_path / "lists" / "list.csv").write_text(f"1.mp4,yoga\n/etc/secret.mp4::x://../..{tmp_path}/lists/a.mp4,yoga\n")
    for allow in (False, True):
        with pytest.raises(ValueError, match="listed videos must be "):
            load_video_dataset(tmp_path / "lists" / "list.csv", allow_outside_root=allow)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("{}/hub/1.mp4", True),
        ("hf://datasets/me/mine@main/1.mp4", True),
        ("zip://1.mp4::hf://datasets/me/mine@main/all.zip", True),
        ("zip://1.mp4::{}/hub/all.zip", True),
        ("{}/secret.mp4", False),
        ("http://169.254.169.254/1.mp4", False),
        ("zip://1.mp4::{}/secret.zip", False),
        ("{}/secret.mp4::hf://datasets/me/mine@main/1.mp4", False),
        ("file://{}/secret.mp4", False),
    ],
)
def test_rows_of_a_dataset_stay_in_it(tmp_path, place, allowed, streaming):
    video = pa.array(
        [{"path": place.format(tmp_path), "bytes": None}], pa.struct({"path": pa.string(), "bytes": pa.binary()})
    )
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"video": video, "label": [0]}), tmp_path / "hub" / "train-0.parquet")
    load = partial(load_video_dataset, tmp_path / "hub", cache_dir=tmp_path / "cache", streaming=streaming)
    if allowed:
        assert len(list(load())) == 1
        return
    with pytest.raises(ValueError, match="videos must be in it or on the Hub"):
        list(load())
    assert len(list(load(allow_outside_root=True))) == 1


@pytest.mark.parametrize("archive", [None, b"no archive"])
def test_an_archive_that_cannot_be_read_is_a_broken_video(tmp_path, archive):
    if archive:
        (tmp_path / "none.zip").write_bytes(archive)
    path = f"zip://1.mp4::{tmp_path}/none.zip"
    dataset = datasets.Dataset.from_list([{"video": {"path": path, "bytes": None}, "label": 0}])
    clips = VideoClips(dataset, lambda video, generator: {}, on_bad_video="error")
    with pytest.raises(VideoDecodingError, match="check that it is there"):
        clips[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_not_utf8(tmp_path, streaming):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "list.json").write_text(json.dumps([{"video": f"{name}.mp4", "label": "a"}]))
    touch(tmp_path / "v" / "a" / f"{name}.mp4", tmp_path / "c" / name / "0.mp4", tmp_path / f"{name}.mp4")
    for source in ("v", "c", "list.json"):
        with pytest.raises(ValueError, match=r"must be UTF-8, got another encoding in .*caf\\udce9.*; rename it"):
            load_video_dataset(tmp_path / source, streaming=streaming)


def test_class_folders_need_no_root(tmp_path):
    touch(tmp_path / "videos" / "a" / "1.mp4")
    assert len(load_video_dataset(tmp_path / "videos", layout="folder", video_root=tmp_path / "other")) == 1


def test_a_class_may_be_called_by_a_number(tmp_path):
    (tmp_path / "list.csv").write_text("1.mp4,yoga\n2.mp4,360\n")
    write_shards(tmp_path / "w", label=lambda i: ("txt", [b"yoga\n", b"360\n"][i % 2]))
    touch(tmp_path / "1.mp4")
    for source in (tmp_path / "list.csv", tmp_path / "w"):
        dataset = load_video_dataset(source, cache_dir=str(tmp_path / "cache"))
        assert label_names_of(dataset) == ["360", "yoga"] and dataset["label"][:2] == [1, 0]


def test_list_with_a_line_that_is_none(tmp_path):
    (tmp_path / "list.txt").write_text("1.mp4 3\nrubbish\n")
    with pytest.raises(ValueError, match="got 'rubbish'"):
        load_video_dataset(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffvideo,label\n1.mp4,yoga\n2.mp4,a bike\n",
        "video,label\r\n1.mp4,yoga\r\n\r\n2.mp4,a bike\r\n",
        "\n\nvideo, label \n1.mp4, yoga\n2.mp4, a bike\n",
        '"video","label"\n"1.mp4","yoga"\n"2.mp4","a bike"\n',
        "\ufeff1.mp4,yoga\r\n2.mp4,a bike\r\n",
        '"1.mp4","yoga"\n2.mp4,"a bike"\n',
    ],
)
def test_lists_as_spreadsheets_write_them(tmp_path, text):
    (tmp_path / "list.csv").write_bytes(text.encode())
    touch(tmp_path / "1.mp4", tmp_path / "2.mp4")
    assert rows(load_video_dataset(tmp_path / "list.csv"), tmp_path) == {"1.mp4": "yoga", "2.mp4": "a bike"}


def test_a_mark_before_the_text_of_other_lists(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "k.csv").write_bytes(mark + b"label,youtube_id,time_start,time_end,split\nyoga,u,0,10,train\n")
    (tmp_path / "list.json").write_bytes(mark + b'[{"video": "u_000000_000010.mp4", "label": "yoga"}]')
    touch(tmp_path / "u_000000_000010.mp4")
    for name in ("k.csv", "list.json"):
        assert rows(load_video_dataset(tmp_path / name), tmp_path) == {"u_000000_000010.mp4": "yoga"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # as names, these would come out as 0: "-1", 1: "10", 2: "2"
        ("list.txt", "1.mp4 10\n1.mp4 -1\n1.mp4 2\n", r"must be among the 11 classes .*, got \[-1\];.*leave these"),
        ("list.csv", "video,label\n1.mp4\n", "list.csv must give a path and a label .*, got '1.mp4' and None"),
        ("list.csv", "video,label\n1.mp4,\n", "list.csv must give a path and a label .*, got '1.mp4' and ''"),
        ("list.csv", "video,label\n,3\n", "list.csv must give a path and a label .*, got '' and '3'"),
        ("list.csv", "video,label\n", "list.csv must hold one video per line below its header, got none"),
        ("list.json", '[{"video": "1.mp4", "label": 1}, {"video": "1.mp4"}]', "got '1.mp4' and None"),
        ("list.json", "video", r"list.json must be valid JSON, got a syntax error \(.*line 1"),
        ("list.csv", b"video,label\n1.mp4,\xe9p\xe9e\n", "list.csv must be .* in UTF-8, .*save it as UTF-8"),
        ("k.csv", "label,youtube_id,time_start,time_end\nyoga,u\n", "k.csv must give time_start and .* in seconds"),
        ("yoga_test_split1.txt", "1.mp4\n", "must hold lines 'name 0', .*got '1.mp4'"),
    ],
)
def test_lists_that_are_not_what_they_should_be(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    touch(tmp_path / "1.mp4")
    with pytest.raises(ValueError, match=message) as error:
        load_video_dataset(tmp_path / name)
    assert type(error.value) is ValueError and "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_named_columns(tmp_path, form):
    table = [{"clip": "1.mp4", "class": "yoga", "n": 1}, {"clip": "2.mp4", "class": "archery", "n": 2}]
    text = {
        "csv": "clip,class,n\n1.mp4,yoga,1\n2.mp4,archery,2\n",
        "json": json.dumps(table),
        "jsonl": "\n".join(map(json.dumps, table)) + "\n",
    }[form]
    (tmp_path / f"list.{form}").write_text(text)
    touch(tmp_path / "1.mp4", tmp_path / "2.mp4")
    dataset = load_video_dataset(tmp_path / f"list.{form}", video_column="clip", label_column="class")
    assert rows(dataset, tmp_path) == {"1.mp4": "yoga", "2.mp4": "archery"}
    assert dataset.column_names == ["video", "label"]
    with pytest.raises(ValueError, match="clip"):
        load_video_dataset(tmp_path / f"list.{form}")


def test_ssv2(tmp_path):
    templates = ["Pushing [something]", "Holding [something] next to [something]"]
    listed = [{"id": str(i), "label": "pushing a cup", "template": t} for i, t in enumerate(templates)]
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps(listed))
    labels = {"Pushing something": "0", "Holding something next to something": "1", "Throwing something": "2"}
    touch(tmp_path / "v" / "0.webm", tmp_path / "v" / "20bn-something-something-v2" / "1.webm")
    source = tmp_path / "something-something-v2-train.json"
    with pytest.raises(ValueError, match=r"must have one \*labels\*.json in its folder"):
        load_video_dataset(source, video_root=tmp_path / "v")
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(labels))
    dataset = load_video_dataset(source, video_root=tmp_path / "v")
    assert label_names_of(dataset) == list(labels)
    assert rows(dataset, tmp_path / "v") == {
        "0.webm": "Pushing something",
        "20bn-something-something-v2/1.webm": "Holding something next to something",
    }


def test_ucf101(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 2\n")
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    (lists / "testlist02.txt").write_text("Archery/v_Archery_g08_c01.avi\n")
    root = tmp_path / "UCF-101"
    touch(root / "Archery" / "v_Archery_g08_c01.avi", root / "v_ApplyEyeMakeup_g01_c01.avi")
    train = {"Archery/v_Archery_g08_c01.avi": "Archery"}
    assert rows(load_video_dataset(lists, video_root=root), root) == train
    assert rows(load_video_dataset(lists / "trainlist01.txt", video_root=root), root) == train
    assert rows(load_video_dataset(lists / "testlist02.txt", video_root=root), root) == train
    test = load_video_dataset(lists, split="test", video_root=root)
    assert rows(test, root) == {"v_ApplyEyeMakeup_g01_c01.avi": "ApplyEyeMakeup"}
    assert label_names_of(test) == ["ApplyEyeMakeup", "Archery"]


def test_hmdb51(tmp_path):
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    (lists / "cartwheel_test_split1.txt").write_text("c1.avi 1 \nc2.avi 2 \nc3.avi 0 \n")
    (lists / "brush_hair_test_split1.txt").write_text("b [x] 1.avi 2 \n")
    (lists / "cartwheel_test_split2.txt").write_text("c1.avi 2 \nc3.avi 1 \n")
    touch(*(tmp_path / "v" / "cartwheel" / name for name in ("c1.avi", "c2.avi", "c3.avi")))
    root = tmp_path / "v"
    assert rows(load_video_dataset(lists, video_root=root), root) == {"cartwheel/c1.avi": "cartwheel"}
    test = load_video_dataset(lists, split="test", video_root=root)
    assert rows(test, root) == {"cartwheel/c2.avi": "cartwheel", "brush_hair/b [x] 1.avi": "brush_hair"}
    assert label_names_of(test) == ["brush_hair", "cartwheel"]
    second = load_video_dataset(lists / "*_test_split2.txt", video_root=root)
    assert rows(second, root) == {"cartwheel/c3.avi": "cartwheel"}


def write_shards(folder, extension="mp4", label=lambda i: ("cls", b"%d" % (i % 2)), shards=2, size=3):
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard:03d}.tar", "w") as tar:
            for i in range(shard * size, (shard + 1) * size):
                video = make_video(folder / f"tmp.{extension}", level=10 * i).read_bytes()
                for name, data in ((extension, video), label(i)):
                    info = tarfile.TarInfo(f"{i:04d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / f"tmp.{extension}").unlink()


def test_one_file_of_hmdb51_is_no_list_of_indices(tmp_path):
    path = tmp_path / "clap_test_split1.txt"
    path.write_text("1.avi 1 \n2.avi 2 \n3.avi 0 \n")
    touch(tmp_path / "1.avi", tmp_path / "2.avi")
    assert rows(load_video_dataset(path), tmp_path) == {"1.avi": "clap"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["mp4", "webm"])
def test_webdataset(tmp_path, extension, streaming):
    write_shards(tmp_path / "w", extension)
    for source in (tmp_path / "w", tmp_path / "w" / "s-{000..001}.tar", tmp_path / "w" / "s-*.tar"):
        dataset = load_video_dataset(source, label_names=["even", "odd"], streaming=streaming, cache_dir=str(tmp_path))
        found = list(dataset)
        assert [row["label"] for row in found] == [0, 1] * 3
        assert label_names_of(dataset) == ["even", "odd"]
        assert set(found[0]) == {"video", "label"}
        assert found[4]["video"]["path"].endswith(f"0004.{extension}")
        assert abs(decode(found[4]["video"])[0].float().mean() - 40) < 4
    with pytest.raises(ValueError, match="must name existing tar shards, got .*s-002"):
        load_video_dataset(tmp_path / "w" / "s-{000..002}.tar")


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_in_a_folder_that_looks_like_a_pattern(tmp_path, streaming):
    write_shards(tmp_path / "[w] *")
    for source in (tmp_path / "[w] *", tmp_path / "[w] *" / "s-000.tar"):
        dataset = load_video_dataset(source, streaming=streaming, cache_dir=str(tmp_path / "cache"))
        assert [row["label"] for row in dataset] == [0, 1] * (3 if source.is_dir() else 1) + [0] * source.is_file()


@pytest.mark.parametrize("content", [b"", b"no tar file" * 1000])
def test_webdataset_that_is_none(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(ValueError, match="the first shard of .*s.tar must be a tar file, got: ") as error:
        load_video_dataset(tmp_path / "s.tar")
    assert "\n" not in str(error.value)


def test_webdataset_with_names_in_json(tmp_path):
    write_shards(tmp_path / "w", label=lambda i: ("json", json.dumps({"label": "ab"[i % 2]}).encode()))
    dataset = load_video_dataset(tmp_path / "w", cache_dir=str(tmp_path))
    assert dataset["label"][:] == [0, 1] * 3 and label_names_of(dataset) == ["a", "b"]
    streamed = load_video_dataset(tmp_path / "w", label_names=["b", "a"], streaming=True)
    assert [row["label"] for row in streamed] == [1, 0] * 3
    with pytest.raises(ValueError, match="give label_names="):
        next(iter(load_video_dataset(tmp_path / "w", streaming=True)))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_beside_a_file_of_a_videos_name(tmp_path, monkeypatch, streaming):
    """datasets would give that file for the video of the shard."""
    write_shards(tmp_path / "w")
    make_video(tmp_path / "0004.mp4", level=200)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no file with the name of a video .*start from another directory"):
        list(load_video_dataset(tmp_path / "w", streaming=streaming, cache_dir=str(tmp_path / "cache")))


def test_webdataset_without_labels(tmp_path):
    write_shards(tmp_path / "w", label=lambda i: ("txt", b"-1"))
    with pytest.raises(ValueError, match=r"labels must be among .*, got \[-1\];"):
        load_video_dataset(tmp_path / "w", cache_dir=str(tmp_path))


def test_webdataset_streamed_without_names_keeps_numbers(tmp_path):
    write_shards(tmp_path / "w")
    dataset = load_video_dataset(tmp_path / "w", streaming=True)
    assert [row["label"] for row in dataset] == [0, 1] * 3
    with pytest.raises(ValueError, match="label_names="):
        label_names_of(dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_as_from_the_hub(tmp_path, streaming):
    video = make_video(tmp_path / "v.mp4").read_bytes()
    labels = datasets.ClassLabel(names=["x", "y"])
    columns = {"clip": datasets.Video(decode=False), "n": datasets.Value("int64"), "label": labels}
    features = datasets.Features(columns)
    table = {"clip": [{"path": f"{i}.mp4", "bytes": video} for i in range(2)], "n": [5, 6], "label": [1, 0]}
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "hub/data/train-0.parquet"))
    options = {"video_column": "clip", "streaming": streaming, "cache_dir": str(tmp_path)}
    dataset = load_video_dataset(tmp_path / "hub", **options)
    found = list(dataset)
    assert [(row["video"], row["label"]) for row in found] == [
        ({"path": "0.mp4", "bytes": video}, 1),
        ({"path": "1.mp4", "bytes": video}, 0),
    ]
    assert set(found[0]) == {"video", "label"} and label_names_of(dataset) == ["x", "y"]
    renamed = load_video_dataset(tmp_path / "hub", label_names=["y", "z", "x"], **options)
    assert [row["label"] for row in renamed] == [0, 2]
    with pytest.raises(ValueError, match=r"'video'.*\['clip', 'n', 'label'\]"):
        load_video_dataset(tmp_path / "hub", cache_dir=str(tmp_path))


def test_streaming_a_folder_gives_the_same_rows(tmp_path):
    touch(*(tmp_path / f"{'ab'[i % 2]}/{i}.mp4" for i in range(5)))
    stream = load_video_dataset(tmp_path, streaming=True)
    assert stream.num_shards == 5
    assert list(stream) == list(load_video_dataset(tmp_path))


def test_unclear_and_unknown_sources(tmp_path):
    touch(tmp_path / "both" / "a" / "1.mp4", tmp_path / "both" / "s.tar")
    with pytest.raises(ValueError, match="must fit one layout, got webdataset and folder;.*layout=.*kinetics"):
        load_video_dataset(tmp_path / "both")
    assert len(load_video_dataset(tmp_path / "both", layout="folder")) == 1
    with pytest.raises(ValueError, match="layout must be auto or one of folder, .*got 'foldr'"):
        load_video_dataset(tmp_path / "both", layout="foldr")
    for layout in ("auto", "folder", "list", "ucf101"):
        with pytest.raises(ValueError, match="no such file or folder"):
            load_video_dataset(tmp_path / "none" / "at" / "all", layout=layout)


# Labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_align_labels_by_name(tmp_path, streaming):
    touch(tmp_path / "a" / "1.mp4", tmp_path / "b" / "2.mp4")
    dataset = load_video_dataset(tmp_path, streaming=streaming)
    aligned = align_labels(dataset, ["b", "c", "a"])
    assert [row["label"] for row in aligned] == [2, 0]
    assert rows(aligned, tmp_path) == {"a/1.mp4": "a", "b/2.mp4": "b"}
    assert align_labels(dataset, ["a", "b"]) is dataset
    with pytest.raises(ValueError, match=r"unknown to the model: \['b'\]"):
        align_labels(dataset, ["a", "c"])


def test_align_labels_of_a_list_without_names(tmp_path):
    (tmp_path / "list.txt").write_text("1.mp4 1\n2.mp4 0\n")
    touch(tmp_path / "1.mp4")
    dataset = load_video_dataset(tmp_path / "list.txt")
    aligned = align_labels(dataset, ["x", "y", "z"])
    assert aligned["label"][:] == [1, 0] and label_names_of(aligned) == ["x", "y", "z"]
    with pytest.raises(ValueError, match="unknown to the model"):
        align_labels(dataset, ["x"])


# Clips --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Six videos of two classes, video i at grey level 20 i; number 3 is broken."""
    for i in range(6):
        make_video(tmp_path / "ab"[i % 2] / f"{i}.mp4", level=20 * i)
    (tmp_path / "b" / "3.mp4").write_bytes(b"this is text")
    return tmp_path


def good(folder):
    return load_video_dataset(folder).filter(lambda row: "3.mp4" not in row["video"]["path"])


def test_an_item(folder):
    item = VideoClips(good(folder), transform)[1]
    assert item["pixel_values"].shape == (2, 3, 24, 32)
    assert abs(item["pixel_values"][0].float().mean() - 40) < 40  # video 2: levels 40 to 75
    assert (item["labels"], item["index"], item["ok"], item["bad"]) == (0, 1, True, {})
    assert item["video_id"] == str(folder / "a" / "2.mp4")


def epoch_of(clips, workers, epoch, **options):
    clips.set_epoch(epoch)
    loader = DataLoader(clips, batch_size=2, num_workers=workers, collate_fn=collate, **options)
    batches = list(loader)
    return {key: torch.cat([b[key] for b in batches]) for key in ("noise", "pixel_values", "index", "labels")}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_randomness_depends_on_seed_epoch_and_index_only(folder):
    dataset = load_video_dataset(folder)
    runs = [epoch_of(VideoClips(dataset, transform, seed=1), workers, epoch=2) for workers in (0, 1, 2)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert len(set(runs[0]["noise"].tolist())) == 6
    clips = VideoClips(dataset, transform, seed=1)
    clips.set_epoch(2)
    late = [clips[i]["noise"].item() for i in (5, 0, np.int64(4))]  # resumed, in another order
    assert late == [runs[0]["noise"][i].item() for i in (5, 0, 4)]
    for other in (epoch_of(clips, 0, epoch=3), epoch_of(VideoClips(dataset, transform, seed=2), 0, epoch=2)):
        assert not set(other["noise"].tolist()) & set(runs[0]["noise"].tolist())


def test_persistent_workers_hear_of_the_epoch(folder):
    clips = VideoClips(good(folder), transform)
    loader = DataLoader(clips, batch_size=5, num_workers=1, persistent_workers=True, collate_fn=collate)
    noise = []
    for epoch in (0, 1):
        clips.set_epoch(epoch)
        noise.append(next(iter(loader))["noise"])
    assert not torch.equal(*noise)
    clips.set_epoch(1)
    assert noise[1][2] == clips[2]["noise"]


def test_global_random_state_is_left_alone(folder):
    before = torch.get_rng_state()
    VideoClips(load_video_dataset(folder), transform)[4]  # the broken one
    assert torch.equal(before, torch.get_rng_state())


def test_repeats_are_clips_of_the_same_video(folder):
    clips = VideoClips(good(folder), transform, repeats=3)
    items = [clips[0], clips[4]]
    assert items[0]["pixel_values"].shape == (3, 2, 3, 24, 32)
    assert len(set(items[0]["noise"].tolist())) == 3
    assert items[0]["noise"][0] == VideoClips(good(folder), transform)[0]["noise"]
    batch = collate(items)
    assert batch["pixel_values"].shape == (6, 2, 3, 24, 32)
    assert torch.equal(batch["noise"], torch.cat([items[0]["noise"], items[1]["noise"]]))
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1] and batch["labels"].dtype == torch.int64
    assert batch["index"].tolist() == [0, 0, 0, 4, 4, 4] and batch["ok"].tolist() == [True] * 6
    assert [Path(name).name for name in batch["video_ids"]] == ["0.mp4"] * 3 + ["5.mp4"] * 3


def test_a_transform_may_change_the_label(folder):
    def flip(video, generator, label):
        return {**transform(video, generator), "labels": 10 + label}

    assert VideoClips(good(folder), flip, with_label=True)[4]["labels"] == 11
    assert VideoClips(good(folder), flip, with_label=True, repeats=2)[4]["labels"].tolist() == [11, 11]


def test_skip_puts_another_video_in_the_place_of_a_broken_one(folder):
    dataset = load_video_dataset(folder)
    broken = [i for i, row in enumerate(dataset) if row["video"]["path"].endswith("3.mp4")][0]
    items = []
    for epoch in range(8):
        clips = VideoClips(dataset, transform)
        clips.set_epoch(epoch)
        items.append(clips[broken])
        level = 20 * int(Path(items[-1]["video_id"]).stem)
        assert level - 4 < items[-1]["pixel_values"].float().mean() < level + 40
        assert items[-1]["labels"] == int(Path(items[-1]["video_id"]).stem) % 2
        assert items[-1]["noise"] == clips[broken]["noise"]
    assert len({item["video_id"] for item in items}) > 1
    assert all(item["index"] == broken and item["ok"] for item in items)
    ((name, reason),) = items[0]["bad"].items()
    assert name == str(folder / "b" / "3.mp4") and reason and name not in reason
    batches = list(DataLoader(VideoClips(dataset, transform), batch_size=3, collate_fn=collate))
    assert [len(batch["labels"]) for batch in batches] == [3, 3]
    assert {name for batch in batches for name in batch["bad"]} == {name}


def test_error_raises_and_other_errors_always_do(folder):
    dataset = load_video_dataset(folder)
    with pytest.raises(VideoDecodingError, match="3.mp4"):
        [VideoClips(dataset, transform, on_bad_video="error")[i] for i in range(6)]

    def mistake(video, generator):
        raise ValueError("a mistake")

    for mode in ("skip", "error", "keep"):
        with pytest.raises(ValueError, match="a mistake"):
            VideoClips(dataset, mistake, on_bad_video=mode)[0]
    with pytest.raises(ValueError, match="on_bad_video must be one of"):
        VideoClips(dataset, transform, on_bad_video="drop")
    with pytest.raises(ValueError, match="repeats"):
        VideoClips(dataset, transform, repeats=0)


class WithBlank:
    def __call__(self, video, generator):
        return transform(video, generator)

    def blank(self):
        return {"pixel_values": torch.zeros(2, 3, 24, 32, dtype=torch.uint8), "noise": torch.zeros(())}


def test_keep_marks_the_broken_one(folder):
    clips = VideoClips(load_video_dataset(folder), WithBlank(), on_bad_video="keep")
    batch = collate([clips[i] for i in range(6)])
    names = [Path(name).stem for name in batch["video_ids"]]
    assert names == ["0", "2", "4", "1", "3", "5"]
    assert batch["ok"].tolist() == [name != "3" for name in names]
    assert batch["labels"].tolist() == [int(name) % 2 for name in names]
    assert batch["pixel_values"].shape == (6, 2, 3, 24, 32)
    assert batch["pixel_values"][4].abs().sum() == 0
    assert len(batch["bad"]) == 1


def test_all_broken(tmp_path):
    touch(tmp_path / "a" / "1.mp4", tmp_path / "a" / "2.mp4")
    dataset = load_video_dataset(tmp_path)
    with pytest.raises(VideoDecodingError, match="; 100 videos in a row could not be decoded"):
        VideoClips(dataset, transform, on_bad_video="skip")[0]
    assert not VideoClips(dataset, WithBlank(), on_bad_video="keep")[0]["ok"]  # nothing stops an evaluation


def test_reports_without_signatures():
    bad = BadVideos()
    bad.add({f"https://a.org/{name}?key=secret&n={i}": "too large?" for i, name in enumerate("aab")})
    bad.add({"videos/why?.mp4": "not a video"})
    lines = [*(f"https://a.org/{name}: too large?" for name in "aab"), "videos/why?.mp4: not a video"]
    assert bad.report().splitlines() == ["4 broken videos", *lines]


def test_bad_videos_are_counted_once():
    bad = BadVideos()
    bad.add({"b.mp4": "frame 3 cannot be decoded", "a.mp4": "empty"})
    bad.add({"b.mp4": "frame 5 cannot be decoded"})
    assert len(bad) == 2
    assert bad.report().splitlines() == [
        "2 broken videos",
        "a.mp4: empty",
        "b.mp4: frame 3 cannot be decoded",
    ]
    assert json.loads(bad.to_json()) == {
        "count": 2,
        "videos": {"a.mp4": "empty", "b.mp4": "frame 3 cannot be decoded"},
    }
    bad.add({f"{i:02d}.mp4": "empty" for i in range(30)})
    assert len(bad.report().splitlines()) == 22 and "and 12 more" in bad.report()


# Streams ------------------------------------------------------------------------------------------


def streamed(folder, workers=0, epoch=0, **options):
    clips = StreamingVideoClips(load_video_dataset(folder, streaming=True), transform, **options)
    clips.set_epoch(epoch)
    return list(DataLoader(clips, batch_size=None, num_workers=workers))


def stems(items):
    return [Path(item["video_id"]).stem for item in items]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_streams_share_out_every_video_once(folder, workers, world_size):
    shares = [streamed(folder, workers, rank=r, world_size=world_size, shuffle_buffer=4) for r in range(world_size)]
    assert sorted(stem for share in shares for stem in stems(share)) == ["0", "1", "2", "4", "5"]
    alone = {item["video_id"]: item for item in streamed(folder)}
    for item in (item for share in shares for item in share):
        other = alone[item["video_id"]]
        assert item["noise"] == other["noise"] and item["index"] == other["index"]
        assert item["labels"] == int(Path(item["video_id"]).stem) % 2
    assert len({item["index"] for item in alone.values()}) == 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("shards", "world_size"), [(2, 2), (3, 2), (4, 3), (1, 2)])
def test_shards_share_out_every_video_once(shards, world_size, workers, tmp_path):
    """By id, in the second epoch too, and where processes and workers do not divide the shards or their videos."""
    write_shards(tmp_path / "w", shards=shards, size=5)
    for epoch in (0, 1):
        seen = []
        for rank in range(world_size):
            dataset = load_video_dataset(tmp_path / "w", label_names=["even", "odd"], streaming=True)
            place = {"rank": rank, "world_size": world_size, "shuffle_buffer": 4}
            clips = StreamingVideoClips(dataset, transform, **place)
            clips.set_epoch(epoch)
            seen += stems(DataLoader(clips, batch_size=None, num_workers=workers))
        assert sorted(seen) == [f"{i:04d}" for i in range(5 * shards)]


def test_streams_name_the_broken_even_at_the_end(folder):
    for order in range(6):
        items = streamed(folder, epoch=order, shuffle_buffer=6)
        assert [name for item in items for name in item["bad"]] == [str(folder / "b" / "3.mp4")]
    (folder / "b" / "5.mp4").write_bytes(b"")
    assert len(collate(streamed(folder))["bad"]) == 2  # 5.mp4 is the last one


def test_streams_shuffle_anew_each_epoch(folder):
    orders = [stems(streamed(folder, epoch=epoch, shuffle_buffer=6, seed=3)) for epoch in range(4)]
    assert len(set(map(tuple, orders))) > 1
    assert orders[1] == stems(streamed(folder, epoch=1, shuffle_buffer=6, seed=3))
    assert stems(streamed(folder)) == ["0", "2", "4", "1", "5"]


def test_a_stream_of_broken_videos_is_an_error(tmp_path, monkeypatch):
    touch(*(tmp_path / "a" / f"{i}.mp4" for i in range(5)))
    with pytest.raises(VideoDecodingError, match="; 5 videos in a row could not be decoded"):
        streamed(tmp_path)
    monkeypatch.setattr(clips_module, "MAX_DRAWS", 3)
    with pytest.raises(VideoDecodingError, match="; 3 videos in a row could not be decoded"):
        streamed(tmp_path)


def test_streamed_shards_decode(tmp_path):
    write_shards(tmp_path / "w", shards=2)
    dataset = load_video_dataset(tmp_path / "w", label_names=["even", "odd"], streaming=True)
    batch = collate(list(StreamingVideoClips(dataset, transform)))
    assert batch["labels"].tolist() == [0, 1] * 3
    assert batch["video_ids"][5] == "s-001.tar/0005.mp4"
    assert batch["pixel_values"].shape == (6, 2, 3, 24, 32)


# Decoded frames -----------------------------------------------------------------------------------


class Decoder:
    """Counts its calls in a file, since datasets may run it in other processes."""

    def __init__(self, log, scale=1):
        self.log, self.scale = str(log), scale

    def __call__(self, video):
        with open(self.log, "a") as file:
            file.write("x")
        return decode(video) // self.scale

    def calls(self):
        return os.path.getsize(self.log) if os.path.exists(self.log) else 0


@pytest.mark.parametrize("num_proc", [None, 2])
def test_cached_frames_give_the_same_clips(folder, own_cache, num_proc):
    dataset = load_video_dataset(folder)
    decoder = Decoder(own_cache / "log")
    cached = cache_frames(dataset, decoder, num_proc=num_proc)
    assert decoder.calls() == 6
    assert cached.cache_files and all(str(own_cache) in file["filename"] for file in cached.cache_files)
    plain, clips = VideoClips(dataset, transform), VideoClips(cached, transform)
    for i in range(6):
        a, b = plain[i], clips[i]
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert (a["labels"], a["video_id"], a["bad"]) == (b["labels"], b["video_id"], b["bad"])
    assert sum(len(clips[i]["bad"]) for i in range(6)) >= 1
    assert align_labels(cached, ["b", "a"])["label"][:] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(VideoDecodingError, match="3.mp4"):
        VideoClips(cached, transform, on_bad_video="error")[4]


def test_cached_frames_are_decoded_again_only_if_something_changed(folder, own_cache):
    def calls(scale=1):
        decoder = Decoder(own_cache / "log", scale)
        before = decoder.calls()
        frames = VideoClips(cache_frames(load_video_dataset(folder), decoder), transform)[0]["pixel_values"]
        return decoder.calls() - before, frames.float().mean().item()

    first = calls()
    assert first[0] == 6
    assert calls() == (0, first[1])
    halved = calls(scale=2)
    assert halved[0] == 6 and halved[1] < first[1]
    make_video(folder / "a" / "0.mp4", level=150, frames=9)
    changed = calls()
    assert changed[0] == 6 and changed[1] > 140


def test_real_class_folders():
    root = os.environ.get("HF_INTI_TEST_DATA")
    if not root:
        pytest.skip("HF_INTI_TEST_DATA is not set: no real videos")
    folder = Path(root) / "datasets" / "miracl_phrases"
    train, test = (load_video_dataset(folder, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1200, 300)
    assert label_names_of(train) == label_names_of(test) and len(label_names_of(train)) == 10
    item = VideoClips(test, transform, on_bad_video="error")[299]
    assert item["labels"] == 9 and "you_are_welcome" in item["video_id"] and item["pixel_values"].shape[-1] == 128
