from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError, WeightsUnavailableError
from unperturb.models.networks.benchmark_classes import CIFAR10
from unperturb.models.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Architecture
from unperturb.models.networks.registry import ACTIVATIONS, build
from unperturb.models.networks.robustbench import ForeignClassifier, parse_name

needs_robustbench = pytest.mark.skipif(find_spec("robustbench") is None, reason="RobustBench is not installed")


@pytest.mark.parametrize(
    ("name", "feature_dim", "millions"),
    [("preact_resnet18", 512, 11.17), ("wide_resnet_10_2", 128, 0.31), ("wide_resnet_28_2", 128, 1.47)],
)
def test_small_image_networks_have_the_published_sizes(name: str, feature_dim: int, millions: float) -> None:
    model = build(Architecture(name=name, num_classes=10))
    assert model.feature_dim == feature_dim
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.02
    x = torch.rand(2, 3, 32, 32)
    features = model.features(x)
    assert features.shape == (2, feature_dim)
    assert torch.equal(model(x), model.logits(features))
    assert not model.training


@pytest.mark.parametrize(("name", "feature_dim"), [("efficientnet_b0", 1280), ("resnet18", 512), ("resnet50", 2048)])
def test_torchvision_networks_split_into_features_and_logits(name: str, feature_dim: int) -> None:
    model = build(Architecture(name=name, num_classes=7, image_size=64, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    x = torch.rand(1, 3, 64, 64)
    assert model.features(x).shape == (1, feature_dim)
    assert model(x).shape == (1, 7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_switch_reaches_every_activation(activation: str) -> None:
    for name in ("wide_resnet_10_1", "resnet18"):
        model = build(Architecture(name=name, num_classes=3, activation=activation))
        kinds = {type(m) for m in model.modules() if type(m).__module__ == "torch.nn.modules.activation"}
        assert kinds == {type(ACTIVATIONS[activation]())}


def test_normalisation_is_inside() -> None:
    torch.manual_seed(0)
    plain = build(Architecture(name="wide_resnet_10_1", num_classes=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    torch.manual_seed(0)
    normalised = build(Architecture(name="wide_resnet_10_1", num_classes=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor((0.5, 0.4, 0.3)).view(1, 3, 1, 1), torch.tensor((0.2, 0.3, 0.4)).view(1, 3, 1, 1)
    assert torch.allclose(normalised(x), plain((x - mean) / std), atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "resnet9000"}, "resnet9000.*wide_resnet_<depth>_<width>"),
        ({"name": "wide_resnet_11_2"}, "6n"),
        ({"activation": "tanh"}, "tanh.*silu"),
        ({"num_classes": 1}, "num_classes=1"),
        pytest.param({"name": "robustbench:NoSuchModel"}, "NoSuchModel", marks=needs_robustbench),
        ({"name": "robustbench:Standard:svhn:Linf"}, "svhn"),
        ({"name": "robustbench:Standard", "activation": "silu"}, "silu"),
    ],
)
def test_architecture_that_cannot_be_built_is_refused(changed: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"name": "preact_resnet18", "num_classes": 10, **changed}
    with pytest.raises(ConfigError, match=message):
        build(Architecture(**values))  # type: ignore[arg-type]


def test_pretrained_weights_without_a_network_name_file_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(WeightsUnavailableError, match=r"resnet18-.*\.pth in .*checkpoints"):
        build(Architecture(name="resnet18", num_classes=10, image_size=224), pretrained=True)
    with pytest.raises(ConfigError, match="preact_resnet18"):
        build(Architecture(name="preact_resnet18", num_classes=10), pretrained=True)


def test_robustbench_names_have_defaults() -> None:
    assert parse_name("robustbench:Carmon2019Unlabeled") == ("Carmon2019Unlabeled", "cifar10", "Linf")
    assert parse_name("robustbench:Wang2023Better_WRN-28-10:cifar100:L2")[1:] == ("cifar100", "L2")


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty weights folder outside the checkout, and no network."""
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path))
    folder = tmp_path / "robustbench" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    return folder


@needs_robustbench
def test_robustbench_weights_that_were_placed_load_offline(weights: Path) -> None:
    from robustbench.model_zoo.cifar10 import Wong2020FastNet

    original = Wong2020FastNet()
    torch.save(original.state_dict(), weights / "Wong2020Fast.pt")
    model = build(Architecture(name="robustbench:Wong2020Fast", num_classes=10))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(x), original.eval()(x), atol=1e-5)
    assert torch.allclose(model.logits(model.features(x)), model(x), atol=1e-5)
    assert model.feature_dim == 512
    assert not (Path(__file__).parents[2] / "models" / "cifar10").exists()


@needs_robustbench
def test_robustbench_classifier_loads_as_a_frozen_checkpoint_without_a_head(weights: Path) -> None:
    from robustbench.model_zoo.cifar10 import Wong2020FastNet

    torch.save(Wong2020FastNet().state_dict(), weights / "Wong2020Fast.pt")
    loaded = store.load("robustbench:Wong2020Fast")
    assert loaded.card.classes == CIFAR10
    assert (loaded.head, loaded.bank, loaded.card.weights_sha256) == (None, None, "")
    assert not any(parameter.requires_grad for parameter in loaded.classifier.parameters())


@needs_robustbench
def test_robustbench_without_weights_says_which_file_to_place(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("gdown.download", offline)
    with pytest.raises(WeightsUnavailableError, match=str(weights / "Wong2020Fast.pt")):
        build(Architecture(name="robustbench:Wong2020Fast", num_classes=10))


@needs_robustbench
def test_robustbench_web_page_in_place_of_weights_is_recognised(weights: Path) -> None:
    (weights / "Wong2020Fast.pt").write_text("<!DOCTYPE html><html>quota exceeded</html>")
    with pytest.raises(WeightsUnavailableError, match="web page"):
        build(Architecture(name="robustbench:Wong2020Fast", num_classes=10))


@needs_robustbench
def test_robustbench_weights_of_no_bytes_are_refused_by_name(weights: Path) -> None:
    (weights / "Wong2020Fast.pt").touch()
    with pytest.raises(WeightsUnavailableError, match=r"could not be loaded \(EOFError.*place RobustBench's"):
        build(Architecture(name="robustbench:Wong2020Fast", num_classes=10))


def test_foreign_classifier_takes_the_last_linear_layers_input() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    model = ForeignClassifier(body, num_classes=3, image_size=2)
    x = torch.rand(4, 3, 2, 2)
    assert torch.allclose(model.features(x), body[:3](x))
    assert torch.allclose(model.logits(model.features(x)), body(x))
    for unfit in (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(1)), nn.Flatten()):
        with pytest.raises(ConfigError, match="linear layer"):
            ForeignClassifier(unfit, num_classes=3, image_size=2)
