"""The recipes of the papers' rows, and recipes that extend others."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import CLIPVisionConfig

from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig
from hf_inti.measure.costs import count_costs
from hf_inti.papers.published import TABLES
from hf_inti.training.arguments import DataArguments, ModelArguments, TrainingArguments
from hf_inti.training.cli import parse_recipe


FOLDER = Path(__file__).parents[1] / "scripts" / "recipes"
ALL = [ModelArguments, DataArguments, TrainingArguments]
REQUIRED = ["--model", "tower", "--train_dir", "videos", "--output_dir", "out"]
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIPS = {
    "b16": ("openai/clip-vit-base-patch16", CLIPVisionConfig(patch_size=16)),
    "l14": ("openai/clip-vit-large-patch14", CLIPVisionConfig(patch_size=14, **LARGE)),
}
DATASETS = {"k400": 400, "ssv2": 174, "ucf101": 101, "hmdb51": 51}
# The middle of a recipe's name: the classes of compression and adaptation, and the model's name in the paper's tables.
METHODS = {
    "inti": ("InTICompression", "NoAdaptation", None),
    "inti_temp": ("InTICompression", "UniFormerV2", "InTI temp 5,7"),
    "naive": ("NoCompression", "NoAdaptation", "Naive"),
    "uniformerv2": ("NoCompression", "UniFormerV2", "UniFormerV2"),
    "zeroi2v": ("NoCompression", "ZeroI2V", "ZeroI2V"),
    "aim": ("NoCompression", "AIM", "AIM"),
    "st_adapter": ("NoCompression", "STAdapter", "ST-Adapter"),
    "tome_temp": ("ToMe", "UniFormerV2", "ToMe temp"),
    "sta_temp": ("STA", "UniFormerV2", "STA temp"),
    "conv_pooling_temp": ("ConvPooling", "UniFormerV2", "ConvPooling temp 5,7"),
    "linear_pooling_temp": ("LinearPooling", "UniFormerV2", "LinearPooling temp 5,7"),
}
PUBLISHED = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem.split("_")[0] in DATASETS)
HOSTS = [name for name in PUBLISHED if "_stts_" in name]  # see test_recipes_hosts.py
NAMES = [name for name in PUBLISHED if name not in HOSTS]


def split(name: str) -> tuple[str, str, str]:
    dataset, rest = name.split("_", 1)
    method, tower = rest.rsplit("_", 1)
    return dataset, method, tower


def parse(name: str):
    return parse_recipe(ALL, [str(FOLDER / f"{name}.yaml"), "--train_dir", "videos"])


def configure(name: str) -> InTIClipVisionConfig:
    dataset, _, tower = split(name)
    return InTIClipVisionConfig.from_clip(
        CLIPS[tower][1], **parse(name)[0].config_options(), num_labels=DATASETS[dataset]
    )


def test_every_row_of_the_paper_that_is_here_has_its_recipe():
    wanted = set()
    for table in TABLES:
        for row in table.rows if table.title.startswith(("Table 2", "Table 3", "Table 7")) else ():
            methods = [method for method, (_, _, model) in METHODS.items() if model == row.model]
            assert len(methods) == (bool(row.interpretations) and row.model != "ViFi-CLIP"), row.model
            wanted |= {f"{d}_{m}_{row.tower.lower().replace('/', '')}" for d in table.datasets for m in methods}
    assert len(wanted) == 40
    assert wanted <= set(NAMES)
    assert {name for name in NAMES if split(name)[1] == "inti"} == set(NAMES) - wanted


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_of_its_method(name):
    dataset, method, tower = split(name)
    model, data, training = parse(name)
    compression, adaptation, _ = METHODS[method]
    assert model.model == CLIPS[tower][0] and training.output_dir == f"outputs/{name}"
    config = configure(name)
    with torch.device("meta"):
        built = InTIClipForVideoClassification(config)
    assert type(built.vision_model.compression).__name__ == compression
    assert type(built.vision_model.adaptation).__name__ == adaptation
    assert config.num_frames == 16
    if compression in ("InTICompression", "ConvPooling", "LinearPooling"):
        assert config.compression_layers == ([5, 7] if tower == "b16" else [10, 14])
    if adaptation == "UniFormerV2":
        assert config.adaptation_options["preset"] == ("ssv2" if dataset == "ssv2" else "k400")
        assert config.classifier_dropout == 0.5
    own = adaptation in ("ZeroI2V", "AIM", "STAdapter")
    assert (training.learning_rate > 1e-4) == own  # adapters alone train at a high rate
    frozen = not built.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad
    assert frozen == own
    if dataset == "ssv2":  # never flipped without its labels
        assert not data.flip or data.flip_label_map == {"86": 87, "93": 94, "166": 167}
    assert (data.sampling == "dense") == (own and dataset == "k400") == (data.frame_stride is not None)


def rows_of(name: str) -> list:
    """The tables and rows for which a recipe stands: one, or none for InTI without temporal modules."""
    dataset, method, tower = split(name)
    return [
        (table, row)
        for table in TABLES
        for row in table.rows
        if table.title.startswith(("Table 2", "Table 3", "Table 7")) and dataset in table.datasets
        if row.model == METHODS[method][2] and row.tower.lower().replace("/", "") == tower
    ]


def check_header(name: str) -> str:
    """Its parts are there; returns what it reproduces, on one line."""
    text = (FOLDER / f"{name}.yaml").read_text()
    header = text.split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines()) and max(map(len, text.splitlines())) <= 120
    labels = [line[2:].split(":")[0] for line in header.splitlines() if line[2:3].isupper() and ":" in line[:14]]
    assert labels == ["Reproduces", "Source", "Command", "Hardware"]
    for command in (f"scripts/train.py scripts/recipes/{name}.yaml", f"scripts/evaluate.py outputs/{name}/best"):
        assert command in header
    return " ".join(header.split("# Source")[0].replace("\n#", " ").split())


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_it_is(name):
    told = check_header(name)
    rows = rows_of(name)
    assert len(rows) == (split(name)[1] != "inti")
    for table, row in rows:
        top1 = row.top1[table.datasets.index(split(name)[0])]
        assert f"{top1} top-1" in told and f"at {row.gflops} GFLOPs" in told
        assert row.params is None or f"{row.params} M parameters" in told
        assert "the paper's figures; not reproduced by us" in told


@pytest.mark.parametrize("name", [name for name in NAMES if rows_of(name)])
def test_recipe_trains_the_network_whose_costs_are_printed(name):
    config = configure(name)
    ((table, row),) = rows_of(name)
    options = {**row.interpretations[0].options, "num_labels": DATASETS[split(name)[0]]}
    reading = InTIClipVisionConfig.from_clip(CLIPS[split(name)[2]][1], **options)
    if config.adaptation == "zeroi2v":
        config.adaptation_options["merged"] = True
    assert (config.compression, config.compression_layers) == (reading.compression, reading.compression_layers)
    reading.compression_options.pop("cube", None)  # the default
    assert config.compression_options == reading.compression_options
    with torch.device("meta"):
        ours, theirs = (InTIClipForVideoClassification(c).state_dict() for c in (config, reading))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# Recipes that cost more than 1% less or more than the row that they claim, and why (`published.REASONS`).
OTHER_COSTS = {
    "k400_linear_pooling_temp_b16": "temp",
    "ucf101_linear_pooling_temp_b16": "temp",
    "hmdb51_linear_pooling_temp_b16": "temp",
    **{f"{d}_{m}_temp_b16": "temp" for d in ("k400", "ucf101", "hmdb51") for m in ("inti", "conv_pooling")},
    "ssv2_tome_temp_b16": "guess",
    "ssv2_st_adapter_b16": "st",
    "ssv2_inti_temp_b16": "ssv2",
    "ssv2_linear_pooling_temp_b16": "ssv2",
    "ssv2_conv_pooling_temp_b16": "ssv2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if rows_of(name)])
def test_recipe_costs_what_its_row_says(name):
    ((_, row),) = rows_of(name)
    config = configure(name)
    if config.adaptation == "zeroi2v":  # the row is of the merged model
        config.adaptation_options["merged"] = True
    gmacs = count_costs(config)["total"].gmacs
    assert (abs(gmacs - row.gflops) > 0.01 * row.gflops) == (name in OTHER_COSTS), f"{gmacs:.1f} for {row.gflops}"


def test_demo_recipe():
    model, _, training = parse("demo")
    assert training.epochs > training.warmup_epochs > 0
    # The tower that scripts/pretrain_demo_tower.py makes.
    tower = CLIPVisionConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8
    )
    config = InTIClipVisionConfig.from_clip(tower, **model.config_options())
    assert (config.num_frames, config.compression, config.compression_layers) == (8, "inti", [1, 2])


# Recipes that extend others -----------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path):
    """A function that writes {path: text} and gives the first path."""

    def write(files: dict[str, str]) -> str:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return str(tmp_path / next(iter(files)))

    return write


def test_base_gives_the_defaults(recipes):
    path = recipes(
        {
            "sub/child.yaml": "base: ../middle.yaml\nepochs: 3\nframe_stride: null\ncompression_options: {r: 4}\n",
            "middle.yaml": "base: base.yaml\nlearning_rate: 1e-3\nepochs: 5\ncompression: tome\n",
            "base.yaml": "epochs: 7\nlearning_rate: 2e-3\nbatch_size: 4\nframe_stride: 2\ncompression_options: {a: 1}",
        }
    )
    model, data, training = parse_recipe(ALL, [path, *REQUIRED])
    assert (training.epochs, training.learning_rate, training.batch_size) == (3, 1e-3, 4)
    assert data.frame_stride is None
    assert model.compression == "tome" and model.compression_options == {"r": 4}  # replaced, not mixed
    assert parse_recipe(ALL, [path, *REQUIRED, "--epochs", "9"])[2].epochs == 9


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"a.yaml": "base: a.yaml\n"}, "a recipe must not be its own base, got "),
        ({"a.yaml": "base: b.yaml\n", "b.yaml": "base: sub/../a.yaml\n"}, "a.yaml -> "),
        ({"a.yaml": "base: none.yaml\n"}, "a.yaml: base must be a recipe (a YAML file), got "),
        ({"a.yaml": "base:\n"}, "a.yaml: base must be the path of a recipe, relative to this file, got None"),
        ({"a.yaml": "base: [b.yaml]\n"}, "got ['b.yaml']"),
        (
            {"a.yaml": "base: b.yaml\n", "b.yaml": "epoch: 3\n"},
            "b.yaml: a setting must be one that --help lists",
        ),
        ({"a.yaml": "base: b.yaml\n", "b.yaml": "- a\n"}, "b.yaml must be a mapping of settings to values"),
    ],
)
def test_wrong_bases(files, wanted, recipes):
    with pytest.raises(ValueError) as error:
        parse_recipe(ALL, [recipes(files), *REQUIRED])
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_bases_of_the_recipes_lie_beside_them():
    """So that a folder of recipes can be copied."""
    bases = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).get("base") for name in NAMES]
    assert sum(base is not None for base in bases) > 30
    assert all(base is None or Path(base).stem in NAMES for base in bases)
