"""On a GPU, what the other tests check on a CPU: the same numbers, and the scripts from end to end."""

import json
import shutil

import pytest
import torch
from test_handler import module, repository  # noqa: F401 (fixtures)
from test_scripts import data, lines_of, python, tower  # noqa: F401 (fixtures)
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, pipeline

from conftest import write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from hf_inti.hosts import compress
from hf_inti.model.adaptation import ADAPTATIONS
from hf_inti.model.compression import COMPRESSIONS


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"),
]
OPTIONS = {"sta": {"r": 4}, "tome": {"r": 2}}
PAIRS = [(compression, "none") for compression in COMPRESSIONS] + [("inti", name) for name in ADAPTATIONS]
PAIRS += [("sta", "uniformerv2"), ("conv_pooling", "zeroi2v"), ("linear_pooling", "st_adapter")]
PAIRS = list(dict.fromkeys(PAIRS))


@pytest.fixture
def exact():
    """Convolutions in full float32, as matrix products are."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def make(tiny_config):
    """A function that makes a model none of whose weights is zero, and clips for it."""

    def build(compression, adaptation, **options):
        settings = {"compression_options": OPTIONS.get(compression, {})} | options
        model = InTIClipForVideoClassification(
            tiny_config(compression=compression, adaptation=adaptation, **settings)
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model, torch.randn(3, 8, 3, 32, 32)

    return build


@pytest.mark.parametrize("compression, adaptation", PAIRS)
def test_logits_and_gradients_are_the_cpu_s(compression, adaptation, make, exact):
    model, clips = make(compression, adaptation)
    found = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        logits = model.to(device, torch.float64)(clips.to(device, torch.float64)).logits
        logits.square().sum().backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach().cpu(), grads))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-9)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("compression, adaptation", PAIRS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.2)])
def test_precisions(compression, adaptation, dtype, tolerance, make, exact):
    model, clips = make(compression, adaptation)
    if dtype != torch.float32 and compression in ("sta", "tome", "stts"):
        tolerance = 1.0  # other tokens are kept of nearly equal ones: a wrong scale or a NaN still shows
    with torch.no_grad():
        expected = model(clips).logits
        model.to("cuda", dtype)
        found = model(clips.to("cuda", dtype)).logits
        model.optimize_for_inference()
        fast = model(clips.to("cuda", dtype)).logits
    assert found.dtype == fast.dtype == dtype
    scale = expected.abs().max()
    assert (found.float().cpu() - expected).abs().max() < tolerance * scale
    assert (fast.float().cpu() - expected).abs().max() < tolerance * scale


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("compression", ["inti", "sta"])
def test_compiled(compression, attention, make, exact):
    model, clips = make(compression, "none")
    model.set_attn_implementation(attention)
    model, clips = model.cuda(), clips.cuda()
    with torch.no_grad():
        expected = model(clips).logits
        model.compile()
        torch.testing.assert_close(model(clips).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method, options", [("sta", {"r": 2}), ("tome", {"r": 2})])
def test_a_compressed_host(method, options, exact):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    host = VideoMAEForVideoClassification(VideoMAEConfig(**sizes, image_size=32, patch_size=8, num_frames=8)).eval()
    compress(host, method, **options)
    clips = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = host.double()(clips).logits
        found = host.cuda()(clips.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def train(data, tower, tmp_path):  # noqa: F811
    """A function that trains for three epochs on the GPU, or not, in a process of its own; returns the folder."""

    def train_script(name, *extra, gpu=True):
        folder = tmp_path / name
        flags = f"--model {tower} --num_frames 4 --compression_layers 1 --train_dir {data} --batch_size 4 --resize 32 "
        flags += "--learning_rate 2e-3 --min_lr_ratio 1 --crop center --log_every_steps 1 --epochs 3 "
        flags += f"--eval_dir {data} --output_dir {folder}"
        done = python("scripts/train.py", *flags.split(), *extra, ACCELERATE_USE_CPU=str(not gpu).lower())
        assert done.returncode == 0, done.stderr
        return folder

    return train_script


def losses(folder) -> list[float]:
    return [line["loss"] for line in lines_of(folder / "metrics.jsonl") if "loss" in line]


def test_training_is_the_cpu_s(train):
    on_cpu, on_gpu = losses(train("cpu", gpu=False)), losses(train("gpu"))
    assert len(on_gpu) == len(on_cpu) == 9
    assert on_gpu[0] == pytest.approx(on_cpu[0], abs=1e-4)
    assert on_gpu == pytest.approx(on_cpu, abs=0.05)  # small differences grow


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", [("inti", "uniformerv2"), ("stts", "none"), ("tome", "none")])
def test_mixed_precision_learns_and_resumes(precision, method, train):
    flags = ["--mixed_precision", precision, "--compression", method[0], "--adaptation", method[1]]
    flags += ["--compression_options", json.dumps(OPTIONS.get(method[0], {}))]
    flags += ["--checkpoint_every_epochs", "4", "--epochs", "6"]
    whole = train("whole", *flags)
    assert losses(whole)[-1] < losses(whole)[0]
    model = InTIClipForVideoClassification.from_pretrained(whole / "last")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = whole.with_name("again")
    shutil.copytree(whole, again)  # as a run that was killed after the checkpoint
    assert [p.name for p in (again / "checkpoints").iterdir()] == ["step_12"]
    train("again", *flags, "--resume", "true")
    assert len(losses(again)) == 18 and losses(again)[:12] == losses(whole)[:12]
    assert losses(again) == pytest.approx(losses(whole), abs=0.05)


def test_the_scripts_on_a_gpu(train, data, tmp_path):  # noqa: F811
    folder = train("trained") / "last"
    results = {}
    for device, cpu in (("cpu", "true"), ("gpu", "false")):
        out = tmp_path / f"evaluation_{device}"
        flags = ["--data_dir", data, "--num_clips", "2", "--output_dir", out]
        done = python("scripts/evaluate.py", folder, *flags, ACCELERATE_USE_CPU=cpu)
        assert done.returncode == 0, done.stderr
        results[device] = json.loads((out / "results.json").read_text())
    assert results["gpu"]["top1"] == results["cpu"]["top1"]
    videos = sorted((data / "test").rglob("*.mp4"))
    done = python("scripts/predict.py", folder, *videos, "--json", ACCELERATE_USE_CPU="false")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(videos)


def test_pipeline(make, tmp_path):
    model, _ = make("inti", "uniformerv2")
    model.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    InTIClipVideoProcessor(num_frames=8, **sizes).save_pretrained(tmp_path)
    write_video(tmp_path / "a.mp4")
    answers = []
    for device in ("cpu", "cuda"):
        classify = pipeline("video-classification", model=str(tmp_path), device=device)
        answers.append({each["label"]: each["score"] for each in classify(str(tmp_path / "a.mp4"))})
    assert answers[0] == pytest.approx(answers[1], abs=1e-3)


def test_endpoint_handler(repository, module):  # noqa: F811
    """It answers in bfloat16 on a GPU, with nearly the scores of the model in float32."""
    handler, clip = module.EndpointHandler(str(repository)), repository / "clip.mp4"
    assert handler.model.device.type == "cuda" and handler.model.dtype == torch.bfloat16
    answer = {each["label"]: each["score"] for each in handler({"inputs": clip.read_bytes()})}
    handler.decode.close()
    classify = pipeline("video-classification", model=str(repository), device="cpu")
    assert answer == pytest.approx({each["label"]: each["score"] for each in classify(str(clip))}, abs=0.05)
