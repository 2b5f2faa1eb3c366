import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from tests.conftest import make_checkpoint
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import CARD, WEIGHTS, Checkpoint, load, read_card
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks.robustbench import ForeignClassifier
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.models.purifiers.vote import Vote


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store.save(tmp_path, make_checkpoint())
    return tmp_path


def rewrite_card(folder: Path, **changed: object) -> None:
    raw = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**raw, **changed}))


def architecture(**changed: object) -> dict[str, object]:
    return {"name": "preact_resnet18", "num_classes": 3, **changed}


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights with a digest that fits, as a hostile card would have."""
    payload = save(tensors)
    (folder / WEIGHTS).write_bytes(payload)
    import hashlib

    rewrite_card(folder, weights_sha256=hashlib.sha256(payload).hexdigest())


def test_round_trip_in_full_precision_gives_the_same_scores(tmp_path: Path, images: torch.Tensor) -> None:
    made = make_checkpoint()
    card = store.save(tmp_path, made, half=False)
    loaded = load(tmp_path)
    assert loaded.card == card
    assert torch.equal(loaded.classifier(images), made.classifier(images))
    assert loaded.head is not None
    assert made.head is not None
    features = made.classifier.features(images)
    assert torch.equal(loaded.head(features), made.head(features))
    assert loaded.bank is not None
    assert made.bank is not None
    assert torch.allclose(loaded.bank.embeddings, made.bank.embeddings, atol=1e-7)
    assert torch.equal(loaded.bank.labels, made.bank.labels)
    assert not any(p.requires_grad for p in loaded.classifier.parameters())


def test_half_precision_storage_loads_as_float32(folder: Path, images: torch.Tensor) -> None:
    loaded = load(folder)
    assert {p.dtype for p in loaded.classifier.parameters()} == {torch.float32}
    assert torch.allclose(loaded.classifier(images), make_checkpoint().classifier(images), atol=1e-2)
    assert loaded.bank is not None
    assert torch.allclose(loaded.bank.embeddings.norm(dim=1), torch.ones(40), atol=1e-6)


def test_card_holds_digest_versions_and_schema(folder: Path) -> None:
    card = read_card(folder)
    assert len(card.weights_sha256) == 64
    assert card.made_by["versions"]["torch"] == torch.__version__.split("+")[0]
    assert card.bank_size == 40


def test_classifier_alone_round_trips_but_cannot_purify(tmp_path: Path) -> None:
    store.save(tmp_path, make_checkpoint(head=False))
    loaded = load(tmp_path)
    assert loaded.head is None
    with pytest.raises(CheckpointError, match="no head"):
        defend(loaded, PRESETS["default"])


def test_altered_weights_are_refused(folder: Path) -> None:
    payload = bytearray((folder / WEIGHTS).read_bytes())
    payload[-1] ^= 1
    (folder / WEIGHTS).write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has SHA-256"):
        load(folder)


def test_pickle_in_place_of_weights_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Invariant 7."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "exploded"),)

    payload = pickle.dumps(Bomb())
    (folder / WEIGHTS).write_bytes(payload)
    rewrite_card(folder, weights_sha256=hashlib.sha256(payload).hexdigest())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


def test_type_of_numbers_that_pytorch_has_not_is_refused(folder: Path) -> None:
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    payload = len(header).to_bytes(8, "little") + header + b"\0"
    (folder / WEIGHTS).write_bytes(payload)
    rewrite_card(folder, weights_sha256=hashlib.sha256(payload).hexdigest())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)


def test_wrong_shape_unknown_and_missing_tensors_are_refused_by_name(folder: Path) -> None:
    good = load_file(folder / WEIGHTS)
    rewrite_weights(folder, {**good, "classifier.linear.bias": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"classifier\.linear\.bias has shape \(4,\)"):
        load(folder)
    rewrite_weights(folder, {**good, "classifier.extra": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"unknown classifier\.extra"):
        load(folder)
    rewrite_weights(folder, {k: v for k, v in good.items() if k != "head.layers.0.bias"})
    with pytest.raises(CheckpointError, match=r"lacks head\.layers\.0\.bias"):
        load(folder)


def test_weights_that_are_not_finite_are_refused_on_load_and_on_save(folder: Path) -> None:
    good = load_file(folder / WEIGHTS)
    rewrite_weights(folder, {**good, "classifier.linear.bias": torch.tensor([0.0, float("nan"), 0.0])})
    with pytest.raises(CheckpointError, match=r"classifier\.linear\.bias holds values that are not finite"):
        load(folder)
    made = make_checkpoint()
    with torch.no_grad():
        next(made.classifier.parameters()).fill_(float("inf"))
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match="is not finite; it was not saved"):
        store.save(folder, made)
    assert (folder / WEIGHTS).read_bytes() == before


def test_robustbenchs_classifier_is_stored_as_it_is_and_the_head_for_it_as_float16(tmp_path: Path) -> None:
    made, theirs = make_checkpoint(), nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    foreign = ForeignClassifier(theirs, num_classes=3, image_size=2)
    store.save(tmp_path, dataclasses.replace(made, classifier=foreign))
    stored = load_file(tmp_path / WEIGHTS)
    assert torch.equal(stored["classifier.model.1.weight"], theirs.get_parameter("1.weight"))
    assert stored["head.layers.0.weight"].dtype == torch.float16


@pytest.mark.parametrize("halved", [(), ("tied",)], ids=["float32", "float16"])
def test_tensor_of_two_names_is_stored_under_both(tmp_path: Path, halved: tuple[str, ...]) -> None:
    def tied() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        made[1].weight = made[0].weight
        made.register_buffer("places", torch.arange(4))
        made.register_buffer("first", made.get_buffer("places")[:2])
        return made

    one, other = tied(), tied()
    digest = store.write_weights(tmp_path / WEIGHTS, {"tied": one}, halved=halved)
    store.read_weights(tmp_path / WEIGHTS, digest, {"tied": other})
    for name, value in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], value, atol=1e-3), name


def test_weights_beyond_float16_are_stored_as_they_are(tmp_path: Path) -> None:
    made = make_checkpoint()
    with torch.no_grad():
        next(made.classifier.parameters()).fill_(1e6)
    store.save(tmp_path, made)
    name, first = next(iter(made.classifier.named_parameters()))
    assert torch.equal(store.load(tmp_path).classifier.state_dict()[name], first)
    dtypes = {value.dtype for value in load_file(tmp_path / WEIGHTS).values() if value.is_floating_point()}
    assert dtypes == {torch.float16, torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"schema_version": 99}, "schema version 1"),
        ({"architecture": {"name": "preact_resnet18"}}, "lacks"),
        ({"architecture": {"name": "resnet9", "num_classes": 3}}, "resnet9"),
        ({"architecture": {"name": "preact_resnet18", "num_classes": "3"}}, "num_classes='3' is not of type int"),
        ({"classes": ["one"]}, "1 classes for 3"),
        ({"head": {"hidden": 8, "embedding_dim": 4, "temperature": -1.0}}, "temperature"),
        ({"head": {"hidden": -8, "embedding_dim": 4, "temperature": 0.2}}, "cannot be built"),
        ({"vote": {"shifts": []}}, "at least one view"),
        ({"vote": {"shifts": [[0, 16]]}}, "vote: shifts=0/16: under half the side of the images, 32 pixels"),
        ({"vote": {"shifts": [[1, 1, 1]]}}, r"shifts=\[1, 1, 1\] is not of type tuple\[int, int\]"),
        ({"classes": 5}, r"classes=5 is not of type tuple\[str, \.\.\.\]"),
        ({"classes": "abc"}, "classes='abc' is not of type tuple"),
        ({"classes": ["a", "b", [2]]}, r"classes=\[2\] is not of type str"),
        ({"training": 7}, "training=7 is not of type dict"),
        ({"data": []}, r"data=\[\] is not of type dict"),
        ({"head_training": None}, "head_training=None is not of type dict"),
        ({"architecture": architecture(options=5)}, "options=5 is not of type dict"),
        ({"architecture": architecture(name=f"wide_resnet_{'9' * 5000}_1")}, "cannot be built"),
        ({"architecture": architecture(name="wide_resnet_604_16")}, "the depth is 6n"),
        ({"architecture": architecture(name="wide_resnet_16_32")}, "the width 1 to 16"),
        ({"architecture": architecture(mean=["0", "0", "0"])}, "mean='0' is not a finite number"),
        ({"architecture": architecture(mean=[0.5, 0.5])}, r"mean=\[0\.5, 0\.5\] is not of type tuple"),
        ({"architecture": architecture(std=[0, 1, 1])}, r"std=\(0\.0, 1\.0, 1\.0\) must be above 0"),
        ({"architecture": architecture(width=float("nan"))}, "width=nan is not a finite number"),
        ({"gates": {"default": {"loss": 10**400}}}, "the gate of 'default' has no finite loss"),
        ({"head": {"hidden": 10**400, "embedding_dim": 4, "temperature": 0.2}}, "cannot be built"),
        ({"bank_size": True}, "bank_size=True is not of type int"),
        ({"restorer": {"width": 4, "depth": 2, "epsilon": 0.1, "kind": "bogus"}}, "kind='bogus' is not of type"),
        ({"purifier": 3}, "RestorerCard is not an object"),
        ({"vote": {"turns": [1]}}, r"unknown keys \['turns'\]"),
    ],
    ids=str,
)
def test_card_that_it_does_not_know_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    rewrite_card(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_cards_vote_is_kept(tmp_path: Path) -> None:
    made, vote = make_checkpoint(), Vote(shifts=((0, 0), (1, -2)), mirrored=False)
    store.save(tmp_path / "voted", dataclasses.replace(made, card=dataclasses.replace(made.card, vote=vote)))
    assert load(tmp_path / "voted").card.vote == vote


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_card_that_is_no_card_is_refused(folder: Path, content: bytes) -> None:
    (folder / CARD).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"card\.json"):
        load(folder)


def test_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device='cuda:99' is not on this machine"):
        load(folder, device="cuda:99")


def test_missing_folder_and_missing_weights_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no/such/place"):
        load("no/such/place")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_crash_while_saving_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    old = load(folder).card
    monkeypatch.setattr(Path, "replace", fail)
    made = make_checkpoint()
    with pytest.raises(OSError, match="disk full"):
        store.save(folder, Checkpoint(dataclasses.replace(made.card, id="new"), made.classifier))
    assert load(folder).card == old
