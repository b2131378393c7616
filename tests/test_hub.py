"""Pushing to a server of the Hub's routes, its failures, and the whole way from training to a stranger's pipeline."""

import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import av
import numpy as np
import pytest
import torch
import yaml
from hub_server import OTHER, READ, WRITE, HubServer, hub_fixture  # noqa: F401 (it is called hub)
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, pipeline

import hf_inti.hub.folder
import hf_inti.hub.push
from conftest import TINY, write_video
from forks import run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.hub.card import metadata_of_run
from hf_inti.hub.folder import PICKLES, files_of, prepare_folder, public_run, validate_folder
from hf_inti.hub.metadata import fingerprint
from hf_inti.hub.push import push_folder, push_model


ROOT = Path(__file__).parents[1]
REPO = "me/inti"
CARD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: video-classification\n---\n# A model\n"


@pytest.fixture
def waits(monkeypatch):
    """The waits, in seconds, that were asked for and not made."""
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


@pytest.fixture
def folder(tmp_path):
    """A small repository: the server does not care what a model is."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "code.py").write_text("answer = 42\n")
    (folder / "sub" / "log.jsonl").write_text("{}\n")
    save_file({"weight": torch.arange(1000.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """best/ of a training run, untrained, with the run's files one folder up."""
    run_dir = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    names = dict(enumerate(["opens", "closes", "root"]))
    config = InTIClipVisionConfig(**TINY, num_frames=8, id2label=names, label2id={n: i for i, n in names.items()})
    InTIClipForVideoClassification(config).save_pretrained(run_dir / "best")
    side = {"height": 32, "width": 32}
    InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=side).save_pretrained(run_dir / "best")
    arguments = {
        "ModelArguments": {"model": "openai/clip-vit-base-patch16"},
        "DataArguments": {"train_dir": str(run_dir / "my_videos"), "layout": "auto", "eval_split": "test"},
    }
    versions = {"torch": "2", "transformers": "5"}
    run = {"command": [str(ROOT / "train.py"), f"--train_dir={run_dir}/my_videos"], "arguments": arguments}
    more = {"versions": versions, "commit": None, "num_processes": 1, "config": config.to_dict()}
    (run_dir / "run.json").write_text(json.dumps({**run, **more}))
    (run_dir / "metrics.jsonl").write_text('{"step": 2, "loss": 1.1}\n')
    return run_dir / "best"


@pytest.fixture(scope="module")
def prepared(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "repository"
    return folder, prepare_folder(model_dir, folder, REPO)


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared folder, to break."""
    for path in prepared[0].rglob("*"):
        target = tmp_path / "copy" / path.relative_to(prepared[0])
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


@pytest.fixture
def no_reload(monkeypatch):
    """Leaves out the clean process, which takes long."""
    monkeypatch.setattr(hf_inti.hub.folder, "check_reload", lambda *arguments: None)


@pytest.fixture
def no_figure(monkeypatch):
    """Leaves out the picture, which takes long too."""
    monkeypatch.setattr(hf_inti.hub.folder, "draw_figure", lambda *arguments: None)


def ask(hub, method, path, body=None, token=WRITE):
    request = Request(hub.url + path, method=method, data=None if body is None else json.dumps(body).encode())
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


# ---- the server


def test_server_checks_tokens(hub):
    body = {"name": "inti", "organization": "me"}
    for token, status in ((None, 401), ("hf_no", 401), (READ, 403), (OTHER, 403)):
        assert ask(hub, "POST", "/api/repos/create", body, token)[0] == status
    assert hub.repositories == {}
    assert ask(hub, "POST", "/api/repos/create", {**body, "visibility": "private"})[0] == 200
    for token, status in ((None, 401), (OTHER, 404), (READ, 200), (WRITE, 200)):
        assert ask(hub, "GET", f"/api/models/{REPO}", token=token)[0] == status
    status, _, answer = ask(hub, "POST", "/api/repos/create", body)
    assert status == 409 and json.loads(answer)["url"] == f"{hub.url}/{REPO}"


def test_server_checks_large_files(hub, folder):
    api = HfApi()
    api.create_repo(REPO)
    oid = "0" * 64
    assert ask(hub, "PUT", f"/blobs/{oid}", {"not": "it"}, token=None)[0] == 400
    assert ask(hub, "PUT", f"/blobs/{oid}", {"not": "it"}, token=WRITE)[0] == 400
    header = {"key": "header", "value": {"summary": "x"}}
    lines = [header, {"key": "lfsFile", "value": {"path": "a", "oid": oid, "size": 1}}]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    request = Request(f"{hub.url}/api/models/{REPO}/commit/main", body, {"Authorization": f"Bearer {WRITE}"})
    with pytest.raises(HTTPError, match="400") as caught:
        urlopen(request)
    caught.value.close()
    assert hub.commits(REPO) == 0


def test_server_serves_what_was_committed(hub, folder):
    api = HfApi()
    api.create_repo(REPO)
    operations = [CommitOperationAdd(name, folder / name) for name in ("README.md", "model.safetensors")]
    sha = api.create_commit(REPO, operations, commit_message="one").oid
    info = api.model_info(REPO)
    assert (info.sha, info.private, hub.commits(REPO)) == (sha, False, 1)
    assert [f.rfilename for f in info.siblings] == [".gitattributes", "README.md", "model.safetensors"]
    assert info.pipeline_tag == "video-classification"
    sizes = {entry.path: entry.size for entry in api.list_repo_tree(REPO)}
    assert sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    for name in ("README.md", "model.safetensors"):
        assert Path(hf_hub_download(REPO, name)).read_bytes() == (folder / name).read_bytes()
    _, headers, _ = ask(hub, "HEAD", f"/{REPO}/resolve/main/model.safetensors", token=None)
    assert headers["X-Repo-Commit"] == sha and len(headers["X-Linked-Etag"]) == 66
    with pytest.raises(HfHubHTTPError, match="404"):
        hf_hub_download(REPO, "no.json")


# ---- push_folder


def test_one_commit_with_everything(hub, folder, capsys):
    assert push_folder(folder, REPO, commit_message="Trained") == f"{hub.url}/{REPO}"
    assert hub.commits(REPO) == 1 and not hub.repositories[REPO].private
    assert hub.repositories[REPO].history[-1].message == "Trained"
    files = {**hub.files(REPO)}
    assert files.pop(".gitattributes")
    assert files == {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "Pushed 4 files" in capsys.readouterr().out


def test_pushing_again_makes_no_commit(hub, folder, capsys):
    push_folder(folder, REPO)
    capsys.readouterr()
    assert push_folder(folder, REPO) == f"{hub.url}/{REPO}"
    assert hub.commits(REPO) == 1 and hub.count("commit") == 1 and hub.count("upload") == 1
    assert "No commit made" in capsys.readouterr().out
    (folder / "code.py").write_text("answer = 43\n")
    push_folder(folder, REPO)
    assert hub.commits(REPO) == 2 and hub.files(REPO)["code.py"] == b"answer = 43\n"


def test_private(hub, folder, monkeypatch):
    push_folder(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    push_folder(folder, REPO)  # stays as it is
    assert hub.repositories[REPO].private and hub.commits(REPO) == 1
    monkeypatch.setenv("HF_TOKEN", OTHER)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(REPO, "README.md")


def test_private_is_refused_where_it_would_be_public(hub, folder):
    push_folder(folder, REPO)
    (folder / "code.py").write_text("secret = 42\n")
    with pytest.raises(ValueError, match="got a public repository"):
        push_folder(folder, REPO, private=True)
    assert hub.commits(REPO) == 1


def test_weights_of_an_earlier_push_are_deleted(hub, folder):
    push_folder(folder, REPO)
    HfApi().upload_file(path_or_fileobj=b"old", path_in_repo="pytorch_model.bin", repo_id=REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    push_folder(folder, REPO)
    names = set(hub.files(REPO))
    assert "model-00001-of-00001.safetensors" in names and "notes.txt" in names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    assert hub.commits(REPO) == 4
    push_folder(folder, REPO)
    assert hub.commits(REPO) == 4


ROUTES = {  # each with the words for it
    "info": "looking the repository up",
    "create": "creating the repository",
    "validate": "checking the card",
    "preupload": "announcing the files",
    "batch": "preparing the upload",
    "upload": "uploading a file",
    "commit": "committing",
}
FAILURES = {
    401: "hf auth login",
    403: "write permission for me",
    404: "check the name",
    409: "wait a minute",
    429: "too many requests",
    500: "push again later",
    "drop": "connection was lost",
}


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("route", ROUTES)
def test_failure_at_every_route(route, what, hub, folder, waits, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    hub.fail(route, what)
    with pytest.raises(ValueError) as caught:
        push_folder(folder, REPO)
    message = str(caught.value)
    if (route, what) == ("info", 401):  # like a repository that does not exist; it is made, and then is not seen either
        assert "401" in message
    assert ROUTES[route] in message and FAILURES[what] in message and "\n" not in message
    assert ("may have been made" in message) == ((route, what) == ("commit", "drop"))
    assert hub.commits(REPO) == 0
    if what in (429, 500, "drop"):
        assert 3 <= len(waits) <= 5 and waits == sorted(waits)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr()) + caplog.text
    assert WRITE not in shown and caught.value.__context__ is None
    hub.faults.clear()
    push_folder(folder, REPO)
    assert hub.commits(REPO) == 1


@pytest.mark.parametrize("what", [429, 500, "drop"])
@pytest.mark.parametrize("route", ROUTES)
def test_passing_failure_is_waited_out(route, what, hub, folder, waits):
    hub.fail(route, what, times=2)
    push_folder(folder, REPO)
    assert hub.commits(REPO) == 1 and len(waits) == 2


def test_commit_whose_answer_is_lost_is_made_once(hub, folder, waits):
    hub.fail("commit", "lose")
    push_folder(folder, REPO)
    assert hub.commits(REPO) == 1 and hub.count("commit") == 1


@pytest.mark.parametrize(
    "token, repo, says",
    [
        (None, REPO, "hf auth login"),
        ("hf_thisOneHasExpiredLongAgo", REPO, "hf auth login"),
        (READ, REPO, "write permission for me"),
        (WRITE, "somebody/inti", "write permission for somebody"),
        (WRITE, "inti", "NAMESPACE/NAME"),
        (WRITE, "a/b/c", "NAMESPACE/NAME"),
    ],
)
def test_who_may_push(token, repo, says, hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=says) as caught:
        push_folder(folder, repo)
    assert hub.repositories == {} and "\n" not in str(caught.value) and str(token) not in str(caught.value)


def test_read_token_for_a_repository_that_exists(hub, folder, monkeypatch):
    push_folder(folder, REPO)
    monkeypatch.setenv("HF_TOKEN", READ)
    (folder / "code.py").write_text("")
    with pytest.raises(ValueError, match="403.*write permission for me"):
        push_folder(folder, REPO)
    assert hub.commits(REPO) == 1


def test_server_that_sends_the_token_back(hub, folder, waits, capfd):
    hub.fail("commit", 500, message=f"Bearer {WRITE} and hf_{'x' * 34}")
    with pytest.raises(ValueError, match=r"Bearer \*\*\* and \*\*\*") as caught:
        push_folder(folder, REPO)
    assert WRITE not in "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())


def test_token_in_a_file_is_not_pushed(hub, folder):
    (folder / "run.json").write_text(json.dumps({"note": f"token={WRITE}"}))
    with pytest.raises(ValueError, match="got one in run.json") as caught:
        push_folder(folder, REPO)
    assert hub.requests == [] and WRITE not in str(caught.value)


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="unset HF_HUB_OFFLINE"):
        push_folder(folder, REPO)


# ---- prepare_folder and validate_folder


def test_prepared_files(prepared, model_dir):
    folder, notes = prepared
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {"README.md", "config.json", "model.safetensors", "video_preprocessor_config.json", "handler.py"}
    wanted |= {"requirements.txt", "example.mp4", "figure.png", "run.json", "metrics.jsonl", "modeling_inti_clip.py"}
    assert wanted <= names
    assert not [name for name in names if name.endswith((*PICKLES, "hub.py", "training.py"))]
    assert (folder / "example.mp4").stat().st_size < 200_000
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "video-classification"
    assert sum("run.json" in note for note in notes) == 1
    run_dir = str(model_dir.parent)
    for name in names:
        content = (folder / name).read_bytes()
        assert run_dir.encode() not in content and str(ROOT).encode() not in content, name
    assert json.loads((folder / "run.json").read_text())["config"]["id2label"]["2"] == "root"


def test_preparing_twice_gives_the_same_files(prepared, model_dir, tmp_path):
    prepare_folder(model_dir, tmp_path / "again", REPO)
    for path in prepared[0].rglob("*"):
        again = tmp_path / "again" / path.relative_to(prepared[0])
        if path.suffix == ".mp4":  # x264 does not always choose the same bits, and the figure shows its frames
            clips = [np.stack([f.to_ndarray(format="rgb24") for f in av.open(str(p)).decode(0)]) for p in (path, again)]
            assert abs(np.subtract(*clips, dtype=int)).mean() < 1
        elif path.suffix == ".png":
            pictures = [np.asarray(Image.open(each).convert("RGB")) for each in (path, again)]
            assert abs(np.subtract(*pictures, dtype=int)).mean() < 1
        elif path.is_file():
            assert path.read_bytes() == again.read_bytes(), path.name


def test_public_run(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    run = {
        "command": ["/home/ann/train.py", "r.yaml", "--train_dir=/data/ann lee/k400", "--model", "C:\\m\\clip"],
        "arguments": {"DataArguments": {"train_dir": "../ann/k400", "eval_dir": "hf/k400", "repeats": 2}},
        "url": "https://ann:secret@host/k400.tar?token=1",
        "out": "outputs/ann/best",
        "config": {"id2label": {"0": "/m/ann", "1": "ann"}, "_name_or_path": "/home/ann/clip"},
        "commit": "0d55b09",
    }
    public, changed = public_run(run)
    assert public == {
        "command": ["train.py", "r.yaml", "--train_dir=k400", "--model", "clip"],
        "arguments": {"DataArguments": {"train_dir": "k400", "eval_dir": "hf/k400", "repeats": 2}},
        "url": "https://host/k400.tar",
        "out": "outputs/user/best",
        "config": {"id2label": {"0": "/m/ann", "1": "ann"}, "_name_or_path": "clip"},
        "commit": "0d55b09",
    }
    assert changed == ["command", "arguments.DataArguments.train_dir", "url", "out", "config._name_or_path"]


@pytest.mark.parametrize(
    "name", [f"weights{suffix}" for suffix in PICKLES] + ["disguised.json", "disguised.safetensors"]
)
def test_pickles_are_refused(name, copy, hub):
    torch.save({"a": torch.ones(1)}, copy / name)
    with pytest.raises(ValueError, match=f"must not be pickles, got {name}"):
        validate_folder(copy)
    with pytest.raises(ValueError, match=f"must not be pickles, got {name}"):
        push_folder(copy, REPO)
    assert hub.requests == []


def test_safetensors_may_begin_like_a_pickle(folder, hub):
    for length in range(500, 700):
        save_file({"a": torch.ones(1)}, folder / "model.safetensors", {"note": "x" * length})
        if (folder / "model.safetensors").read_bytes().startswith(b"\x80\x02"):  # the length of the header, 640 bytes
            break
    else:
        raise AssertionError("no header of 640 bytes")
    push_folder(folder, REPO)
    assert hub.commits(REPO) == 1


def test_pickles_beside_a_model(copy, no_figure, tmp_path):
    torch.save({}, copy / "training_args.bin")  # Trainer writes it
    assert "training_args.bin: left out, it is a pickle." in prepare_folder(copy, tmp_path / "a", REPO)
    assert not (tmp_path / "a" / "training_args.bin").exists()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle"):
        prepare_folder(copy, tmp_path / "b", REPO)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_weight(path):
    state = InTIClipForVideoClassification.from_pretrained(path.parent).state_dict()
    save_file({name: w for name, w in state.items() if not name.startswith("classifier")}, path, {"format": "pt"})


def spoil_a_weight(path):
    model = InTIClipForVideoClassification.from_pretrained(path.parent)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    model.save_pretrained(path.parent)


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("modeling_inti_clip.py", Path.unlink, "must hold modeling_inti_clip.py, the code"),
        ("handler.py", Path.unlink, "must hold handler.py, got none"),
        ("video_preprocessor_config.json", lambda path: edit(path, num_frames=4), "must make 8 frames .* got 4"),
        (
            "config.json",
            lambda path: edit(path, id2label={"0": "a", "1": "a", "2": "b"}),
            "must hold 3 different names, got 2",
        ),
        ("README.md", lambda path: path.write_text("---\nlicense: [\n---\n"), "card's header must be readable, got"),
        ("README.md", lambda path: path.write_text(CARD.replace("video-", "image-")), "pipeline_tag"),
        (
            "README.md",
            lambda path: path.write_text(CARD.replace("license: mit\n", "")),
            "must have a license, got none",
        ),
        ("model.safetensors", Path.unlink, "must hold weights in safetensors, got none"),
        ("model.safetensors", shorten, "must load, got: "),
        ("model.safetensors", lose_a_weight, "classifier.bias"),
        ("model.safetensors", spoil_a_weight, "must be finite, got inf or NaN"),
    ],
)
def test_what_is_wrong_is_named(name, damage, says, copy):
    damage(copy / name)
    with pytest.raises(ValueError, match=says) as caught:
        validate_folder(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_clean_process_finds_what_this_one_does_not(copy):
    with (copy / "modeling_inti_clip.py").open("a") as file:
        file.write("\nimport hf_inti\n")
    with pytest.raises(ValueError, match="must load and run without hf_inti, got: .*hf_inti"):
        validate_folder(copy)


@pytest.mark.slow
def test_other_weights_than_the_model_has(copy, model_dir):
    model = InTIClipForVideoClassification.from_pretrained(copy)
    with torch.no_grad():
        model.classifier.bias += 1e-5
    model.save_pretrained(copy)
    with pytest.raises(ValueError, match="must differ by at most 1e-6, got 1e-05"):
        validate_folder(copy, model_dir)


def test_example(model_dir, no_figure, tmp_path):
    write_video(tmp_path / "mine.mp4")
    prepare_folder(model_dir, tmp_path / "a", REPO, example=tmp_path / "mine.mp4")
    assert (tmp_path / "a" / "example.mp4").read_bytes() == (tmp_path / "mine.mp4").read_bytes()
    with pytest.raises(ValueError, match="must be an .mp4 file"):
        prepare_folder(model_dir, tmp_path / "b", REPO, example=tmp_path / "absent.mp4")


def test_results_and_metadata_are_pushed(model_dir, no_figure, tmp_path):
    model = InTIClipForVideoClassification.from_pretrained(model_dir)
    shutil.copyfile(model_dir.parent / "run.json", model_dir / "run.json")
    metadata = metadata_of_run(model_dir)
    (model_dir / "run.json").unlink()
    metadata["dataset"]["id"], metadata["license"] = "me/clips", "mit"
    (tmp_path / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    counts = {"top1": 0.75, "top5": 1.0, "mean_class_accuracy": 0.75, "num_videos": 4, "num_unreadable": 0}
    classes = {"per_class": {"opens": 0.5, "closes": 1.0}, "confusion_matrix": [[1, 1, 0], [0, 2, 0], [0, 0, 0]]}
    about = {"arguments": {}, "command": ["evaluate.py"], "commit": None, "fingerprint": fingerprint(model)}
    more = {"protocol": {"frames": 8, "crops": 1, "clips": 1}, "versions": {"torch": "2", "transformers": "5"}}
    (tmp_path / "results.json").write_text(json.dumps({**counts, **classes, **about, **more}))
    given = {"metadata": str(tmp_path / "metadata.yaml"), "results": tmp_path / "results.json"}
    prepare_folder(model_dir, tmp_path / "a", REPO, **given)
    (entry,) = yaml.safe_load((tmp_path / "a" / ".eval_results" / "clips.yaml").read_text())
    assert entry["value"] == 0.75 and ".eval_results/clips.yaml" in files_of(tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert data.license == "mit" and data.eval_results[0].metric_value == 0.75


def test_dry_run_needs_neither_network_nor_token(model_dir, hub, no_reload, no_figure, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    push_model(model_dir, REPO, dry_run=True)
    out = capsys.readouterr().out
    assert hub.requests == []
    size = (model_dir / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in out and "pipeline_tag: video-classification" in out


def test_no_token_is_noticed_before_the_work(model_dir, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hf_inti.hub.push, "prepare_folder", None)
    with pytest.raises(ValueError, match="hf auth login"):
        push_model(model_dir, REPO)


# ---- loading what was pushed


@pytest.mark.parametrize("honest", [True, False])
def test_truncated_weights_are_an_error(honest, hub, prepared, waits):
    push_folder(prepared[0], REPO)
    size = len(hub.files(REPO)["model.safetensors"])
    hub.truncate("model.safetensors", size // 2, honest)
    with pytest.raises(Exception, match="incomplete|Consistency check|should be of size") as caught:
        InTIClipForVideoClassification.from_pretrained(REPO)
    assert not isinstance(caught.value, (AttributeError, KeyError, TypeError))
    hub.truncated.clear()
    if not honest:  # nothing broken stays in the cache; an honest server's file is in it, whatever it is
        InTIClipForVideoClassification.from_pretrained(REPO)


def test_with_the_package_no_trust_is_needed(hub, prepared, model_dir):
    push_folder(prepared[0], REPO, private=True)
    classify = pipeline("video-classification", model=REPO)
    assert type(classify.model) is InTIClipForVideoClassification
    clip = hf_hub_download(REPO, "example.mp4")
    model = InTIClipForVideoClassification.from_pretrained(model_dir).eval()
    pixel_values = InTIClipVideoProcessor.from_pretrained(model_dir)(clip)["pixel_values"]
    with torch.no_grad():
        best, label = model(pixel_values).logits[0].softmax(-1).max(-1)
    (answer,) = classify(clip, top_k=1)
    assert answer["label"] == model.config.id2label[label.item()]
    assert answer["score"] == pytest.approx(best.item(), abs=1e-6)


STRANGER = """
import json, sys
try:
    import hf_inti
    raise SystemExit("hf_inti can be imported here")
except ImportError:
    pass
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

repo, url = sys.argv[1:]
trust = {"trust_remote_code": True}
clip = hf_hub_download(repo, "example.mp4")
out = {"num_frames": AutoConfig.from_pretrained(repo, **trust).num_frames}
model = AutoModelForVideoClassification.from_pretrained(repo, **trust).eval()
tower = AutoModel.from_pretrained(repo, **trust).eval()
pixel_values = AutoProcessor.from_pretrained(repo, **trust)(clip, return_tensors="pt")["pixel_values"]
assert torch.equal(pixel_values, AutoVideoProcessor.from_pretrained(repo, **trust)(clip)["pixel_values"])
with torch.no_grad():
    out["logits"] = model(pixel_values=pixel_values).logits[0].tolist()
    out["of_tower"] = model.classifier(tower(pixel_values=pixel_values).pooler_output)[0].tolist()
classify = pipeline("video-classification", model=repo, **trust)
out["path"], out["url"], out["list"] = classify(clip), classify(url), classify([clip, clip], top_k=1)
out["bf16"] = pipeline("video-classification", model=repo, dtype=torch.bfloat16, **trust)(clip, top_k=99)
print(json.dumps(out))
"""


def run(command, environment, cwd):
    done = subprocess.run(list(map(str, command)), env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    """Train two steps, push, and load by name in a fresh virtual environment without hf_inti and an empty cache."""
    for i in range(4):
        write_video(tmp_path / "data" / "train" / ("opens", "closes")[i % 2] / f"{i}.mp4", seed=i)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16))
    tower.save_pretrained(tmp_path / "tower")
    server = HubServer()
    try:
        here = server.environment(tmp_path / "home", ACCELERATE_USE_CPU="true")
        flags = "--num_frames 4 --compression_layers 1 --train_dir data --max_steps 2 --batch_size 2 --resize 32"
        command = [ROOT / "scripts" / "train.py", "--model", "tower", "--output_dir", "mine", *flags.split()]
        status, _, error = run_in_a_fork(*command, cwd=tmp_path, environment=here)
        assert status == 0, error
        command = [ROOT / "scripts" / "push_to_hub.py", "mine/last", REPO]
        status, *shown = run_in_a_fork(*command, cwd=tmp_path, environment=here)
        assert status == 0, shown
        assert "Pushed" in shown[0] and server.commits(REPO) == 1
        assert {"metrics.jsonl", "run.json"} <= set(server.files(REPO))
        assert WRITE not in "".join(shown)

        run([sys.executable, "-m", "venv", "--without-pip", "fresh"], here, tmp_path)
        installed = str(Path(torch.__file__).parents[1])  # .pth files are not read there, so no editable hf_inti
        elsewhere = server.environment(tmp_path / "empty", token=None, PYTHONPATH=installed)
        (tmp_path / "elsewhere").mkdir()
        url = f"{server.url}/{REPO}/resolve/main/example.mp4"
        python = tmp_path / "fresh" / "bin" / "python"
        shown = run([python, "-c", STRANGER, REPO, url], elsewhere, tmp_path / "elsewhere")
        found = json.loads(shown[0].splitlines()[-1])
        example = server.files(REPO)["example.mp4"]
        assert {path.split("?")[0] for _, path, _ in server.requests if WRITE in path} == set()
    finally:
        server.close()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or WRITE.encode() not in path.read_bytes(), path

    model = InTIClipForVideoClassification.from_pretrained(tmp_path / "mine" / "last").eval()
    pixel_values = InTIClipVideoProcessor.from_pretrained(tmp_path / "mine" / "last")(example)["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits[0]
    assert found["num_frames"] == 4
    for name in ("logits", "of_tower"):
        torch.testing.assert_close(torch.tensor(found[name]), logits, rtol=0, atol=1e-6)
    scores, order = logits.softmax(-1).sort(descending=True)
    names = [model.config.id2label[i] for i in order.tolist()]
    for key, tolerance in (("path", 1e-6), ("url", 1e-6), ("bf16", 0.02)):
        if key != "bf16":
            assert [answer["label"] for answer in found[key]] == names
        answers = {answer["label"]: answer["score"] for answer in found[key]}
        assert answers == pytest.approx(dict(zip(names, scores.tolist(), strict=True)), abs=tolerance)
    assert found["list"] == [found["path"][:1]] * 2
    assert not os.path.exists(tmp_path / "elsewhere" / "hf_inti")
