import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

from tests.support.checkpoints import BATCH, SIDE, convolutions, imported, saved
from unperturb.models.checkpoints import store
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.inference.folding import folded
from unperturb.models.networks.exported import operator

pytestmark = pytest.mark.usefixtures("one_thread")


def norm_call(operator: str, **mode: Any) -> list[Any]:
    """Return a call that may write over running statistics."""
    given = {"input": "%@images", "weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5}
    running = {"running_mean": "%b_1_running_mean", "running_var": "%b_1_running_var"}
    return [operator, ["y"], {**given, **running, **mode}]


class Attending(nn.Module):
    """A patch embedding, a class token, attention, a constant, and sizes that are computed from the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 17, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.patches(x).flatten(2).transpose(1, 2)
        found = torch.cat((self.token.expand(x.shape[0], -1, -1), found), 1) + self.places
        normed = self.norm(found)
        found = found + self.attention(normed, normed, normed, need_weights=False)[0]
        rows = found.reshape(x.shape[0] * 17, 8) * self.scale
        scores: Tensor = self.head(F.gelu(rows, approximate="tanh").view(x.shape[0], 17, 8)[:, 0])
        return scores


def attending() -> nn.Module:
    torch.manual_seed(4)
    return Attending().eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved program of the convolutions."""
    return saved(tmp_path_factory.mktemp("program") / "good.pt2", convolutions())


@pytest.fixture
def made(good: Path, tmp_path: Path) -> Path:
    """A checkpoint of it that a test may alter."""
    store.save(tmp_path / "made", imported(good), half=False)
    return tmp_path / "made"


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # torch 2.11, of itself
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("make", [convolutions, attending], ids=["convolutions", "attention"])
def test_exported_network_gives_its_scores_and_gradients_for_any_number_of_images(
    tmp_path: Path, make: Callable[[], nn.Module], decomposed: bool
) -> None:
    network = make()
    program = export(network, (torch.rand(2, 3, SIDE, SIDE),), dynamic_shapes=BATCH)
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "her.pt2")
    made = imported(tmp_path / "her.pt2", mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), id="her")
    assert made.card.architecture.name == "export:her"
    assert made.card.classes == ("0", "1", "2", "3", "4")
    assert made.card.pictures.size == SIDE
    assert str(tmp_path) not in json.dumps(made.card.training)
    store.save(tmp_path / "made", made, half=False)
    loaded = store.load(tmp_path / "made").classifier
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7)))
    for count in (1, 5):
        x = torch.rand(count, 3, SIDE, SIDE, requires_grad=True)
        expected = network((x - mean) / std)
        for classifier in (made.classifier, loaded, folded(loaded)):
            scores = classifier(x)
            assert torch.allclose(scores, expected, atol=1e-5)
            ours, theirs = (torch.autograd.grad(one[:, 1].sum(), x, retain_graph=True)[0] for one in (scores, expected))
            assert torch.allclose(ours, theirs, atol=1e-5)


class Of(nn.Module):
    """A network, and what somebody does before it or with what it gives."""

    def __init__(
        self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Any] = lambda y: y
    ) -> None:
        super().__init__()
        self.network, self.before, self.after = convolutions(), before, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.network(self.before(x)))


def in_training(network: nn.Module) -> nn.Module:
    return network.train()


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (convolutions, {"dynamic_shapes": None}, "batch size is fixed at 2; export it with dynamic_shapes"),
        (convolutions, {"dynamic_shapes": ({0: Dim("b", max=64)},)}, "limited to 64"),
        (
            convolutions,
            {"shape": (2, 3, SIDE, 24)},
            r"of \['any', 3, 16, 24\], not float32 of \[batch, 3, side, side\]",
        ),
        (lambda: in_training(convolutions()), {}, "training mode: call model.eval"),
        (lambda: in_training(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 5))), {}, "training mode"),
        (lambda: convolutions(end=nn.Softmax(1)), {}, "ends in softmax.int, and not in a linear layer"),
        (lambda: Of(after=lambda y: (y, y + 1)), {}, "answers with 2 values"),
        (lambda: Of(before=lambda x: (x * 2).detach()), {}, "no gradient passes"),
        (lambda: Of(before=lambda x: x - x.mean(0, keepdim=True)), {}, "depend on the images beside it"),
        (lambda: Of(before=lambda x: torch.fft.fft2(x).real), {}, "operator 'fft_fft2.default' is not one"),
        (lambda: Of(before=lambda x: x / 0), {}, "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_network_that_is_no_classifier_of_single_images_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], options: dict[str, Any], says: str
) -> None:
    saved(tmp_path / "her.pt2", make(), **options)
    with pytest.raises(ConfigError, match=says):
        imported(tmp_path / "her.pt2")


def test_size_is_the_exported_one_unless_any_will_do(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exported for 16 pixels"):
        imported(good, image_size=32)
    side = Dim("side", min=8, max=64)
    saved(tmp_path / "any.pt2", convolutions(), dynamic_shapes=({0: Dim("batch"), 2: side, 3: side},))
    assert imported(tmp_path / "any.pt2", image_size=24).card.pictures.size == 24


@pytest.mark.parametrize("what", ["weights", "pretrained"])
def test_program_brings_its_own_weights(good: Path, tmp_path: Path, what: str) -> None:
    if what == "weights":
        torch.save(convolutions().state_dict(), tmp_path / "w.pth")
        with pytest.raises(ConfigError, match="one of the two"):
            imported(good, weights=tmp_path / "w.pth")
    else:
        saved(tmp_path / "her.pt2", convolutions(bias=False))
        assert imported(tmp_path / "her.pt2").classifier.num_classes == 5


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def rewritten(source: Path, file: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Copy an archive, each of its members changed by name and content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file


def pickled(trace: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(trace), buffer)
    return buffer.getvalue()


def test_no_code_of_a_program_is_run(good: Path, tmp_path: Path) -> None:
    trace = tmp_path / "code was run"

    def example(name: str, content: bytes) -> bytes:
        return pickled(trace) if "sample_inputs" in name else content

    def weight(name: str, content: bytes) -> bytes:
        if name.endswith("weight_0"):
            return pickled(trace)
        return (
            content.replace(b'"use_pickle": false', b'"use_pickle": true', 1) if "weights_config" in name else content
        )

    def expression(name: str, content: bytes) -> bytes:
        evil = f"__import__('os').mkdir('{trace}')".encode()
        return re.sub(rb"Symbol\('(\w+)', positive=True, integer=True\)", evil, content)

    file = rewritten(good, tmp_path / "example.pt2", example)
    x = torch.rand(3, 3, SIDE, SIDE)
    assert torch.allclose(imported(file).classifier(x), convolutions()(x), atol=1e-5)
    with pytest.raises(CheckpointError, match="is a pickled object, and loading it would run code"):
        imported(rewritten(good, tmp_path / "weight.pt2", weight))
    with pytest.raises(ConfigError, match="limited to __import__"):
        imported(rewritten(good, tmp_path / "expression.pt2", expression))
    assert not trace.exists()
    assert pickle.loads(pickle.dumps(Evil(trace))) is None  # it would have
    assert trace.is_dir()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "is not a file"),
        ("text", "BadZipFile"),
        ("weights", "no archive of torch.export.save"),
        ("older", "before 2.8: save it again"),
        ("compiled", "holds compiled code"),
        ("newer", "of schema 9, and only 8 is known"),
        ("cut", "can be read: RuntimeError"),
        ("half", "can be read: KeyError"),
    ],
)
def test_file_that_is_no_program_is_refused(good: Path, tmp_path: Path, kind: str, says: str) -> None:
    file = tmp_path / "her.pt2"
    changes: dict[str, Callable[[str, bytes], bytes]] = {
        "newer": lambda _, content: content.replace(b'"schema_version": {"major": 8', b'"schema_version": {"major": 9'),
        "cut": lambda name, content: content[:8] if name.endswith("weight_0") else content,
        "half": lambda name, content: content.replace(b'"input_specs"', b'"other"'),
        "compiled": lambda _, content: content,
    }
    if kind in changes:
        rewritten(good, file, changes[kind])
    if kind == "text":
        file.write_text("program")
    elif kind == "weights":
        torch.save({"a": torch.ones(1)}, file)
    elif kind in ("older", "compiled"):
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(
                "serialized_exported_program.json" if kind == "older" else "good/data/aotinductor/a.so", ""
            )
    with pytest.raises(CheckpointError, match=says):
        imported(file)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (["from_file.default", ["y"], {"filename": "passwd"}], "'from_file.default' is not one of those"),
        (["save.value", ["y"], {"item": "%@images", "filename": "x"}], "'save.value' is not one"),
        (["relu.__class__", ["y"], {"self": "%@images"}], "is not one of those"),
        (["__class__.default", ["y"], {}], "is not one of those"),
        (["sizes.__import__", ["y"], {"a": 1, "b": 2}], "is not one of those"),
        (["relu.default", ["y"], {"self": "%nowhere"}], "uses 'nowhere', which nothing before it has made"),
        (["relu_.default", ["y"], {"self": "%p_0_weight"}], "writes over what is to stay"),
        (["add.out", ["y"], {"self": "%@images", "other": 1, "out": "%p_0_weight"}], "writes over what is to stay"),
        (
            ["max.dim_max", ["y", "z"], {"self": "%@images", "dim": 1, "max": "%p_0_weight", "max_values": "%b"}],
            "writes over what is to stay",
        ),
        (["dropout.default", ["y"], {"input": "%@images", "p": 0.5, "train": 1}], "in training mode"),
        (norm_call("batch_norm.default", training=True), "in training mode"),
        (norm_call("batch_norm.default", training="%@images"), "in training mode"),
        (norm_call("instance_norm.default", use_input_stats=True), "in training mode"),
        (norm_call("_native_batch_norm_legit.default", training=False), "writes over what is to stay"),
        (["relu.default", ["y"], {"self": {"of": "x"}}], "is no value"),
        (["relu.default", ["y"], {"self": "@nothing"}], "is no value"),
        (["relu.default", ["y"], {"elf": "%@images"}], "does not take images"),
    ],
    ids=str,
)
def test_altered_card_can_call_nothing_but_operators_on_tensors(made: Path, call: list[Any], says: str) -> None:
    card = json.loads((made / store.CARD).read_text())
    card["architecture"]["options"]["calls"].insert(0, json.dumps(call))
    (made / store.CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=says):
        store.load(made)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("view.default", {"self": "%p_0_weight", "size": [8, 3, 3, 3]}),
        ("dropout.default", {"input": "%p_0_weight", "p": 0.5, "train": False}),
        ("type_as.default", {"self": "%p_0_weight", "other": "%p_0_weight"}),
        ("einsum.default", {"equation": "abcd", "tensors": ["%p_0_weight"]}),
        ("split.Tensor", {"self": "%p_0_weight", "split_size": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_are_not_written_over_through_what_may_be_a_view(
    made: Path, operator: str, arguments: dict[str, Any]
) -> None:
    card = json.loads((made / store.CARD).read_text())
    calls = [
        [operator, ["v"], arguments],
        ["detach.default", ["w"], {"self": "%v"}],
        ["relu_.default", ["y"], {"self": "%w"}],
    ]
    card["architecture"]["options"]["calls"][:0] = [json.dumps(call) for call in calls]
    (made / store.CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="writes over what is to stay"):
        store.load(made)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True)], ids=str)
def test_norm_by_an_images_own_statistics_is_taken(tmp_path: Path, norm: nn.Module) -> None:
    saved(tmp_path / "her.pt2", nn.Sequential(nn.Conv2d(3, 8, 4, 4), norm, nn.Flatten(), nn.Linear(128, 5)).eval())
    made, x = imported(tmp_path / "her.pt2").classifier, torch.rand(2, 3, SIDE, SIDE)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert torch.allclose(made(x)[:1], made(x[:1]), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_altered_weights_are_refused(made: Path) -> None:
    weights = made / store.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="its card says"):
        store.load(made)
    for line in ("p_0_weight float32 8 3 3", "p_0_weight object 1", "0 float32 1"):
        card = json.loads((made / store.CARD).read_text())
        card["architecture"]["options"]["tensors"][0] = line
        (made / store.CARD).write_text(json.dumps(card))
        with pytest.raises(CheckpointError):
            store.load(made)


def test_operators_all_exist() -> None:
    from unperturb.models.networks.exported import OPERATORS

    assert all(hasattr(torch.ops.aten, name) for name in OPERATORS)
    assert operator("view.default") is torch.ops.aten.reshape.default
