"""The recipes of STTS on its own hosts: which network they train, at which rates, and that they train.

Their values are compared with their sources in test_recipe_sources.py. Here torchvision's models are made narrow, with
the grids of the real ones, and weights that are random lie where a download would put them.
"""

import json
from pathlib import Path

import pytest
import torch
from test_recipes import FOLDER, HOSTS, check_header, parse
from test_training_hosts import NAMES, classify, run  # noqa: F401 (run is a fixture)

from conftest import write_video
from hf_inti.hosts import compress
from hf_inti.papers.published_hosts import HOST_TABLES
from hf_inti.training.checkpoints import CompressionOverride, load_classifier
from hf_inti.training.hosts import build_host
from hf_inti.training.setup import build_optimizer, build_processor, count_steps
from hf_inti.training.state import TrainingState
from torchvision_models import load


MVIT, SWIN = "k400_stts_mvit_b16", "k400_stts_videoswin_b"
# Title and setting of the published row, top-1 as Table 2 has it, the cost as the header says it.
ROWS = {
    MVIT: ("Table 7 of the STTS paper", "T0 0.9, S4 0.9", 78.1, "56.4 GFLOPs a view"),
    SWIN: ("Table 2 of the STTS paper", "T0 0.6", 81.4, "2.17 TFLOPs for 4 x 3 views"),
}
HOST = {  # of Table 2's rows: MViT-B16 without pretraining, VideoSwin-B pretrained on ImageNet-21K
    MVIT: ("torchvision/mvit_v1_b", "KINETICS400_V1"),
    SWIN: ("torchvision/swin3d_b", "KINETICS400_IMAGENET22K_V1"),
}
# The kept of 8 and 16 pairs of frames, and the side of the square kept of 14 x 14 patches, from the shares that the
# released configurations have.
KEPT = {MVIT: (7, 13), SWIN: (10, 56)}
# Sec. 4.1: scorers, everything else; COSINE_END_LR 1e-6 is a hundredth of MViT's 1e-4, min_lr of VideoSwin is 0.
RATES = {MVIT: (1e-4, 1e-6, 0.01), SWIN: (3e-4, 3e-6, 0.0)}
WARMUP = {MVIT: 3 / 20, SWIN: 0.8 / 10}
STATISTICS = {  # DATA.MEAN and DATA.STD of SlowFast, img_norm_cfg
    MVIT: ([0.45, 0.45, 0.45], [0.225, 0.225, 0.225]),
    SWIN: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def narrow(name: str, num_classes: int = 400):
    """torchvision's mvit_v1_b or swin3d_b, a sixteenth as wide, of few blocks, with its grids up to the selections."""
    from torchvision.models.video import mvit, swin_transformer

    if name == "swin3d_b":
        return swin_transformer.SwinTransformer3d(
            [2, 4, 4], 8, [1, 1, 1, 1], [1, 2, 4, 8], [8, 7, 7], stochastic_depth_prob=0.1, num_classes=num_classes
        )
    kernel, blocks = [3, 3, 3], []
    for heads, start, end, queries, keys in (
        (1, 6, 12, None, 8), (2, 12, 12, 2, 4), (2, 12, 24, None, 4), (4, 24, 24, 2, 2), (4, 24, 24, None, 2)
    ):  # fmt: skip
        stride = [] if queries is None else [1, queries, queries]
        blocks.append(mvit.MSBlockConfig(heads, start, end, kernel if stride else [], kernel, stride, [1, keys, keys]))
    options = {"residual_pool": False, "residual_with_cls_embed": False, "rel_pos_embed": False}
    options |= {"proj_after_attn": False, "stochastic_depth_prob": 0.2, "num_classes": num_classes}
    return mvit.MViT(spatial_size=(224, 224), temporal_size=16, block_setting=blocks, **options)


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A function that puts narrow weights where torch looks for a recipe's, and returns them."""
    load()
    monkeypatch.setattr("torchvision.models.get_model", narrow)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def put(name: str) -> dict[str, torch.Tensor]:
        from torchvision.models import get_model_weights

        host, weights = HOST[name]
        host = host.removeprefix("torchvision/")
        torch.manual_seed(1)
        state = narrow(host).state_dict()
        file = tmp_path / "torch" / "hub" / "checkpoints" / Path(get_model_weights(host)[weights].url).name
        file.parent.mkdir(parents=True)
        torch.save(state, file)
        return state

    return put


def test_these_are_all():
    assert set(HOSTS) == {MVIT, SWIN}


@pytest.mark.parametrize("name", HOSTS)
def test_header_is_of_a_published_row(name):
    title, setting, top1, cost = ROWS[name]
    (row,) = [r for t in HOST_TABLES if t.title.startswith(title) for r in t.rows if r.setting == setting]
    told = check_header(name)
    assert f"{top1} top-1 at {cost} (the paper's figures; not reproduced by us)" in told
    assert float(cost.split()[0]) * (1000 if "TFLOPs" in cost else 1) == row.gflops
    model, _, training = parse(name)
    assert training.output_dir == f"outputs/{name}"
    assert (model.host, model.host_weights, model.compression) == (*HOST[name], row.method)
    options = dict(model.compression_options)
    assert options.pop("sigma") == 0.1  # Sec. 4.1
    assert options == {key: value for key, value in row.options.items() if value}
    # VideoSwin's test resizes the short side to 224, MViT's centre crop is of 256 pixels.
    text = (FOLDER / f"{name}.yaml").read_text()
    assert ("--resize 224" in text) == (name == SWIN)


@pytest.mark.parametrize("name", HOSTS)
def test_network(name, published):
    state = published(name)
    arguments, data, _ = parse(name)
    model = build_host(arguments, NAMES)
    host = model.host
    own = host.state_dict()
    assert all(torch.equal(own[n], value) for n, value in state.items() if not n.startswith("head"))
    selections = [*host.compression.temporal, *host.compression.spatial]
    assert len(selections) == (2 if name == MVIT else 1)
    for selection in selections:
        assert (selection.topk.num_samples, selection.topk.gradient) == (500, "released")  # topk.py
        assert selection.topk.sigma.item() == pytest.approx(0.1)
    processor = build_processor(arguments.checkpoint, model.config, data)
    assert (list(processor.image_mean), list(processor.image_std)) == STATISTICS[name]
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)
    seen = []
    block = host.blocks[4] if name == MVIT else host.features[0][0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[1] if name == MVIT else args[0].shape[1:4]))
    classify(model, torch.zeros(1, arguments.num_frames, 3, 224, 224))
    frames, side = KEPT[name]
    assert seen == [(frames, side, side)]


@pytest.mark.parametrize("name", HOSTS)
def test_rates_of_scorers_and_all_else(name, published):
    published(name)
    arguments, data, training = parse(name)
    model = build_host(arguments, NAMES)
    steps_per_epoch, total = count_steps([None] * 50 * training.gradient_accumulation_steps, data, training)
    assert (steps_per_epoch, total) == (50, 50 * training.epochs)
    optimizer, scheduler = build_optimizer(model, training, steps_per_epoch, total)
    of = {id(p): n.startswith("host.compression.") for n, p in model.named_parameters()}
    rates = []
    for _ in range(total + 1):
        found = {of[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.append((found[True], found[False]))
        optimizer.step()
        scheduler.step()
    assert len(of) == sum(len(group["params"]) for group in optimizer.param_groups)
    scorers, rest, end = RATES[name]
    peak = round(WARMUP[name] * total)
    assert rates[0] == (0, 0) and max(rates) == rates[peak] == pytest.approx((scorers, rest))
    assert rates[peak // 2] == pytest.approx((scorers / 2, rest / 2))
    assert rates[-1] == pytest.approx((scorers * end, rest * end))


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_two_steps(name, published, run, tmp_path, monkeypatch):  # noqa: F811
    """Of the whole recipe, which ends them, and of one that ends there."""
    published(name)
    for i in range(4):
        write_video(tmp_path / "videos" / NAMES[i % 2] / f"{i}.mp4", seed=i)
    flags = ["--train_dir", tmp_path / "videos", "--batch_size", "2", "--gradient_accumulation_steps", "1"]
    flags += ["--num_workers", "0", "--mixed_precision", "no", "--log_every_steps", "1"]  # no GPU, few videos
    record, found = TrainingState.record_losses, []

    def fail(state):
        group_rates = {group["lr"] for group in state.scheduler.optimizer.param_groups}
        found.append(
            (state.step, state.total_steps, state.unwrapped_model.host.compression.temporal[0].topk.sigma.item())
        )
        assert len(group_rates) == 2  # scorers and all else
        if state.step == 2:
            raise OSError("the machine is gone")
        record(state)

    with monkeypatch.context() as broken:
        broken.setattr(TrainingState, "record_losses", fail)
        error = run("train", FOLDER / f"{name}.yaml", *flags, "--output_dir", tmp_path / "whole")
        assert "the machine is gone" in error
    total = 2 * parse(name)[2].epochs
    assert [(step, count) for step, count, _ in found] == [(1, total), (2, total)]
    assert [sigma for *_, sigma in found] == pytest.approx([0.1, 0.1 * (1 - 1 / total)])

    assert run("train", FOLDER / f"{name}.yaml", *flags, "--output_dir", tmp_path / "out", "--max_steps", "2") == ""
    assert run("evaluate", tmp_path / "out" / "last", "--data_dir", tmp_path / "videos", "--resize", "224") == ""


@pytest.mark.slow
def test_published_weights_by_name(published, run, tmp_path):  # noqa: F811
    """VideoSwin-B's row of STA's Table 3 is of weights that torchvision does not prefer."""
    state, weights = published(SWIN), "KINETICS400_IMAGENET22K_V1"
    plain = narrow("swin3d_b").eval()
    plain.load_state_dict(state)
    override = CompressionOverride("sta", compression_options={"r": 320})
    model = load_classifier("torchvision/swin3d_b", override, 4, weights)[0]
    x = torch.randn(1, 4, 3, 224, 224)
    with torch.no_grad():
        wanted = compress(plain, "sta", r=320)(x.transpose(1, 2))
    assert torch.equal(classify(model, x), wanted)
    for name in ("abseiling", "zumba"):
        write_video(tmp_path / "videos" / name / "0.mp4")
    flags = ["--host", "torchvision/swin3d_b", "--data_dir", tmp_path / "videos", "--num_frames", "4"]
    flags += ["--output_dir", tmp_path / "out", "--resize", "224", "--host_weights"]
    assert run("evaluate", *flags, weights) == ""
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_videos"] == 2
    message = "host_weights of swin3d_b must be KINETICS400_V1, KINETICS400_IMAGENET22K_V1, DEFAULT, got 'V2'"
    assert message in run("evaluate", *flags, "V2")
