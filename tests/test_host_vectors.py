"""Outputs of STA's and STTS's released code on small models, reproduced on the hosts.

`vectors/README.md` says how the files were made.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

import released_models as released
from hf_inti.hosts import compress, set_training_progress


FOLDER = Path(__file__).parent / "vectors"
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}


class Case:
    """One file, as numbers of `dtype`."""

    def __init__(self, path: Path, dtype: torch.dtype):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.options = json.loads(file.metadata()["options"])
        self.dtype = dtype
        self.params = self.group("param.", torch.float64)
        self.pixels = self.tensors["in.pixels"].to(dtype) / 64

    def group(self, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return {name: t.to(dtype) for name, t in found.items()}

    def check(self, name: str, got: torch.Tensor) -> None:
        wanted = self.tensors[f"{'out64' if self.dtype == torch.float64 else 'out'}.{name}"]
        tolerance = TOLERANCES[self.dtype]
        assert_close(got, wanted, rtol=tolerance, atol=tolerance)

    def check_kept(self, kept: dict[str, torch.Tensor]) -> None:
        wanted = self.group("out.kept.", torch.long)
        assert {name: places.tolist() for name, places in kept.items()} == {n: p.tolist() for n, p in wanted.items()}


def cases(start: str):
    return [
        pytest.param(path, dtype, id=f"{path.stem}-{str(dtype).removeprefix('torch.')}")
        for path in sorted(FOLDER.glob(f"{start}_*.safetensors"))
        for dtype in TOLERANCES
    ]


def places(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Where the kept tokens (B, K, C) stand among all, x (B, L, C): (B, K)."""
    same = (kept[:, :, None] == x[:, None]).all(dim=-1)
    assert (same.sum(dim=-1) == 1).all()
    return same.int().argmax(dim=-1)


@pytest.mark.parametrize(("path", "dtype"), cases("sta_videomae"))
def test_sta(path, dtype):
    case = Case(path, dtype)
    o = case.options
    sizes = {name: o[name] for name in ("image", "patch", "frames", "width", "heads", "depth")}
    model = released.videomae(case.params, **sizes).to(dtype)
    before, kept = {}, {}
    for i, layer in enumerate(model.videomae.encoder.layer):

        def enter(module, args, output, i=i):
            before[i] = output

        def leave(module, args, output, i=i):
            if output.shape != before[i].shape:
                kept[str(i)] = places(output, before[i])

        layer.output.register_forward_hook(enter)
        layer.register_forward_hook(leave)
    compress(model, "sta", r=o["r"], schedule="released", groups=8)
    with torch.no_grad():
        logits = model(case.pixels.transpose(1, 2)).logits
    case.check_kept(kept)
    case.check("logits", logits)


def stts_model(case: Case) -> torch.nn.Module:
    """Compressed, with the case's weights."""
    o = case.options
    if o["host"] == "MViT":
        model, weights = released.mvit(o["embed"], o["classes"]), released.mvit_weights(case.params)
    else:
        model = released.videoswin(o["embed"], o["depths"], o["heads"], o["window"])
        weights = released.renamed(case.params, released.VIDEOSWIN)
    own = {name: o[name] for name in ("temporal", "spatial", "sigma", "num_samples")}
    model = compress(model.double(), "stts", **own).train(o["training"])
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert all("relative_position_index" in key for key in found.missing_keys), found
    return model.to(case.dtype)


def watch_kept(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Fills with the frames (B, k) and the patches (B, T, n) that each selection keeps."""
    kept = {}
    for i, selection in enumerate(model.compression.temporal):

        def keep_frames(module, args, output, i=i):
            kept[f"temporal.{i}"] = places(output.flatten(2), args[0].flatten(2))

        selection.register_forward_hook(keep_frames)
    for i, selection in enumerate(model.compression.spatial):

        def keep_patches(module, args, output, i=i):
            found = places(output.flatten(0, 1), args[0].flatten(0, 1))
            kept[f"spatial.{i}"] = found.unflatten(0, output.shape[:2])

        selection.register_forward_hook(keep_patches)
    return kept


@pytest.mark.parametrize(("path", "dtype"), cases("stts"))
def test_stts(path, dtype, monkeypatch):
    case = Case(path, dtype)
    model, training = stts_model(case), case.options["training"]
    kept = {} if training else watch_kept(model)
    if training:
        set_training_progress(model, case.options["progress"])
    noise = iter(case.group("in.noise.", dtype).values())
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: next(noise).view(shape))
    grids = []
    model.norm.register_forward_hook(lambda norm, args, output: grids.append(output))
    with torch.set_grad_enabled(training):
        logits = model(case.pixels)
    y = logits if case.options["host"] == "MViT" else grids[0].movedim(-1, 1)
    case.check_kept(kept)
    case.check("y", y.detach())
    assert next(noise, None) is None
    if training and dtype == torch.float64:
        y.square().sum().backward()
        got = dict(model.compression.named_parameters(prefix="compression"))
        wanted = released.renamed(case.group("out64.grad.", dtype), released.STTS)
        assert wanted.keys() == got.keys()
        for name, gradient in wanted.items():
            assert_close(got[name].grad, gradient, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_three_of_each():
    names = [path.stem for path in FOLDER.glob("*.safetensors")]
    for pair in ("sta_videomae", "stts_mvit", "stts_videoswin"):
        assert sum(name.startswith(pair) for name in names) == 3
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000
