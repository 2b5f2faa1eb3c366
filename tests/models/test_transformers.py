"""Image classifiers of transformers', where it is installed, and what is said where it is not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier
from unperturb.models.errors import CheckpointError

LABELS = {0: "cat", 1: "dog", 2: "hamster"}
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, dict[str, Any]] = {
    "ViT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
    },
    "DeiT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
    },
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "ConvNextV2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4},
    "Dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
}


def made(transformers: Any, family: str) -> tuple[Any, nn.Module]:
    torch.manual_seed(5)
    settings = {"image_size": 32, "id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    config = getattr(transformers, f"{family}Config")(**settings, **SMALL[family])
    network: nn.Module = getattr(transformers, f"{family}ForImageClassification")(config)
    return config, network.eval()


@pytest.mark.parametrize("family", SMALL)
def test_folder_that_transformers_saves_is_imported_with_its_scores(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    _, network = made(transformers, family)
    network.save_pretrained(tmp_path / "hers")  # type: ignore[operator]
    described = {
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2] * 3,
    }
    (tmp_path / "hers" / "preprocessor_config.json").write_text(json.dumps(described))
    found = import_classifier(ImportConfig(source=str(tmp_path / "hers")))
    assert found.card.classes == tuple(LABELS.values())
    assert (found.card.pictures.size, found.card.pictures.fit) == (32, "stretch")
    store.save(tmp_path / "made", found, half=False)
    loaded = store.load(tmp_path / "made").classifier
    x = torch.rand(3, 3, 32, 32)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), 0.2
    with torch.no_grad():
        expected = network((x - mean) / std).logits
        assert torch.allclose(found.classifier(x), expected, atol=1e-4)
        assert torch.allclose(loaded(x), expected, atol=1e-4)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"transformers is not installed .*: pip install transformers"):
        store.load(tmp_path / "made")


def test_weights_of_another_number_of_classes_or_network_are_told_apart(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _, network = made(transformers, "ViT")
    network.save_pretrained(tmp_path / "hers")  # type: ignore[operator]
    state = load_file(tmp_path / "hers" / "model.safetensors")
    wider = {**state, "classifier.weight": torch.randn(7, 16), "classifier.bias": torch.randn(7)}
    torch.save(wider, tmp_path / "wider.pth")
    found = import_classifier(ImportConfig(source=str(tmp_path / "hers"), weights=tmp_path / "wider.pth"))
    assert (found.classifier.num_classes, found.card.classes[-1]) == (7, "6")
    assert torch.equal(found.classifier.get_parameter("linear.weight"), wider["classifier.weight"])
    del state["vit.embeddings.cls_token"]
    torch.save({**state, "else.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"1 missing \(network.vit.embeddings.cls_token\); 1 unknown \(network.else"
    ):
        import_classifier(ImportConfig(source=str(tmp_path / "hers"), weights=tmp_path / "other.pth"))


@pytest.mark.parametrize(("name", "library"), [("transformers:vit", "transformers"), ("timm:test_vit", "timm")])
def test_missing_library_of_a_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    architecture = {"name": name, "num_classes": 3, "image_size": 32}
    card = {"id": "x", "architecture": architecture, "classes": list(LABELS.values()), "data": {}, "training": {}}
    (tmp_path / store.CARD).write_text(json.dumps({**card, "schema_version": 1}))
    with pytest.raises(CheckpointError, match=f"{library} is not installed .*: pip install {library}"):
        store.load(tmp_path)
