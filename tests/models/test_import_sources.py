"""What the source of somebody's classifier says of its pictures and classes: a library's, or a folder's own files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier, read_classes
from unperturb.models.checkpoints.importing.sources import open_source
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.imported import build_imported
from unperturb.models.pixels import Preprocessing

PETS = ("cat", "dog", "hamster")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_timms_networks_come_with_their_own_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "w.pth")
    made = import_classifier(ImportConfig(source="timm:test_vit", weights=tmp_path / "w.pth", mean=(0.5, 0.5, 0.4)))
    config = timm.get_pretrained_cfg("test_vit")
    assert made.card.pictures.size == config.input_size[-1]
    assert made.card.pictures.resize == int(config.input_size[-1] / config.crop_pct)
    assert (made.card.architecture.mean, made.card.architecture.std) == ((0.5, 0.5, 0.4), tuple(config.std))
    assert made.classifier.num_classes == 5


def test_folder_in_timms_layout_brings_everything(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    settings = {"input_size": [3, 160, 160], "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bicubic"}
    described = {"architecture": "test_vit", "num_classes": 3, "label_names": list(PETS), "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(described))
    made = import_classifier(ImportConfig(source=str(tmp_path)))
    assert made.card.classes == PETS
    assert made.card.pictures == Preprocessing(size=160, fit="stretch", resize=200, interpolation="bicubic")
    assert str(tmp_path) not in json.dumps(made.card.training)


@pytest.mark.parametrize(
    ("known", "how"),
    [
        ({"size": {"height": 224, "width": 224}, "resample": 2}, ("stretch", 224, 224, "bilinear")),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            ("crop", 256, 224, "bilinear"),
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}, ("crop", 256, 224, "bicubic")),
        ({"size": 224, "resample": 3}, ("stretch", 224, 224, "bicubic")),
    ],
    ids=["vit", "resnet", "convnext", "older"],
)
def test_transformers_folder_says_how_it_wants_its_pictures(
    tmp_path: Path, known: dict[str, Any], how: tuple[str, int, int, str]
) -> None:
    config = {"model_type": "vit", "image_size": 224, "id2label": {"1": "dog", "0": "cat", "10": "hamster"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**known, "image_mean": [0.1, 0.2, 0.3]}))
    source = open_source(str(tmp_path))
    fit, resize, size, interpolation = how
    assert source.pictures == Preprocessing(size=size, fit=fit, resize=resize, interpolation=interpolation)
    assert source.classes == PETS
    assert source.mean == (0.1, 0.2, 0.3)


def test_options_that_a_library_does_not_take_are_said(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    architecture = Architecture(name="timm:test_vit", num_classes=3, image_size=160, options={"flavour": 1})
    with pytest.raises(ConfigError, match="timm:test_vit cannot be built: TypeError"):
        build_imported(architecture)
    known = Architecture(name="timm:test_vit", num_classes=3, image_size=160, options={"drop_path_rate": 0.1})
    assert build_imported(known).num_classes == 3


@pytest.mark.parametrize(
    ("known", "says"),
    [({"do_flip_channel_order": True}, "another order"), ({"do_rescale": False}, "another order or range")],
    ids=str,
)
def test_pictures_that_a_card_cannot_describe_are_refused(tmp_path: Path, known: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=says):
        open_source(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "resample": None}))
    source = open_source(str(tmp_path))
    assert (source.mean, source.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_network_that_normalises_anew_is_told_to() -> None:
    assert open_source("torchvision:inception_v3").options["transform_input"] is True


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\n\n dog \nhamster\n", PETS),
        ('["cat", "dog", "hamster"]', PETS),
        ('{"10": "hamster", "2": "dog", "0": "cat"}', PETS),
        ('{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "hamster"]}', PETS),
        ("\ufeffcat\ndog\nhamster", PETS),
        ("猫\nπ", ("猫", "π")),
    ],
    ids=["lines", "list", "object", "ImageNet's index", "byte order mark", "unicode"],
)
def test_class_names_are_read(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / "names").write_text(text, encoding="utf-8")
    assert read_classes(tmp_path / "names") == names
