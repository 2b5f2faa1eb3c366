import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import make_checkpoint
from tests.support.training import read_log, run_arguments
from unperturb.models.checkpoints import store
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.purifiers.registry import build_defense
from unperturb.models.purifiers.vote import Vote
from unperturb.training.__main__ import main
from unperturb.training.data import Split, load
from unperturb.training.purifier.purifier import PurifierConfig, PurifierTask, Whole, fresh

AUTOENCODER = RestorerCard(width=8, depth=1, epsilon=1.0, scale=2, times=1.0, kind="autoencoder")
CARD = RestorerCard(width=8, depth=2, epsilon=8 / 255, scale=2, times=1.0)


def task(tmp_path: Path, vote: Vote | None = None, **settings: object) -> PurifierTask:
    config = PurifierConfig(checkpoint="tiny", data="none", out=tmp_path, device="cpu", **settings)  # type: ignore[arg-type]
    none = Split(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    return PurifierTask(config, make_checkpoint().classifier, vote, fresh(CARD), none)


@pytest.mark.parametrize("side", [32, 33])
def test_restorer_at_half_size_moves_every_pixel_by_the_unshuffled_estimate(side: int) -> None:
    torch.manual_seed(3)
    restorer, x = Restorer(CARD).eval(), torch.rand(2, 3, side, side)
    restored = restorer.restored(x)
    assert restored.shape == x.shape
    assert 0 < (restored - x).abs().max() <= CARD.epsilon + 1e-6
    if side == 32:
        small = x.numpy().reshape(2, 3, 16, 2, 16, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 16, 16)
        estimate = restorer.layers(torch.from_numpy(small.copy())).tanh().detach().numpy()
        full = estimate.reshape(2, 3, 2, 2, 16, 16).transpose(0, 1, 4, 2, 5, 3).reshape(2, 3, 32, 32)
        assert np.allclose(restored.detach(), np.clip(x.numpy() - CARD.epsilon * full, 0, 1), atol=1e-5)


def test_it_begins_as_the_identity(images: Tensor) -> None:
    assert torch.equal(fresh(CARD).eval().restored(images), images)


@pytest.mark.parametrize("side", [32, 33])
def test_nothing_of_an_image_goes_around_an_autoencoder(side: int) -> None:
    torch.manual_seed(3)
    drawing, x = fresh(AUTOENCODER).eval(), torch.rand(2, 3, side, side)
    drawn = drawing.restored(x)
    assert drawn.shape == x.shape
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert torch.equal(drawing.restored(x, factor=3.0), drawn)
    for parameter in drawing.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(drawing.restored(x), torch.full_like(x, 0.5))


@pytest.mark.parametrize("attack", ["n-fgsm", "pgd"])
def test_attack_grows_with_the_run(
    images: Tensor, tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = task(tmp_path, attack=attack, ramp=0.5, epochs=4)
    whole, labels, own = Whole(None, made.classifier), torch.arange(8) % 3, torch.arange(8)
    most = 3 if attack == "n-fgsm" else 1  # times the radius
    for share in (0.0, 0.25, 1.0):
        moved = float((made.crafted(whole, images, labels, own, share=share) - images).abs().max())
        assert 0.8 * share * 8 / 255 <= moved <= most * share * 8 / 255 + 1e-6
    shares: list[float] = []

    def noted(*_: object, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        shares.append(share)
        return torch.zeros(()), {}

    monkeypatch.setattr(made, "of_batch", noted)
    for epoch in range(4):
        made.loss(torch.tensor([0]), epoch, 0)
    assert shares == [0.0, 0.5, 1.0, 1.0]
    shares.clear()
    made.steps = 8  # of four processes, each of which takes two: their numbers are of one count
    for step in (0, 3, 4, 7):
        made.loss(torch.tensor([0]), 1, step)
    assert shares == [0.5, 0.5 + 3 / 16, 0.75, 0.5 + 7 / 16]


@pytest.mark.parametrize("vote", [None, Vote()], ids=["image", "vote"])
def test_loss_is_the_formula(
    images: Tensor, tmp_path: Path, vote: Vote | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = task(tmp_path, vote, beta=2.0, gamma=3.0)
    torch.nn.init.normal_(made.model.layers[-1].weight, std=0.5)  # type: ignore[arg-type]
    made.model.eval()
    attacked, labels = (images + 0.03 * torch.randn_like(images)).clamp(0, 1), torch.arange(len(images)) % 3
    monkeypatch.setattr(made, "crafted", lambda *_, **__: attacked)
    loss, _ = made.of_batch(Whole(made.model, made.classifier, vote), images, labels, labels)

    def probabilities(x: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        views = [x] if vote is None else list(vote.views(x).unbind(1))
        logits = np.mean([made.classifier(view).detach().double().numpy() for view in views], axis=0)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))

    clean, moved, bare = (
        probabilities(x) for x in (made.model.restored(images), made.model.restored(attacked), images)
    )
    expected = -np.log(moved[np.arange(len(labels)), labels]).mean()
    expected += 2 * (clean * np.log(clean / moved)).sum(1).mean() + 3 * (bare * np.log(bare / clean)).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("attack", ["n-fgsm", "pgd"])
def test_training_attack_goes_through_the_restorer(images: Tensor, tmp_path: Path, attack: str) -> None:
    made = task(tmp_path, attack=attack)
    labels = made.classifier(images).argmax(1)
    before = made.crafted(Whole(made.model, made.classifier), images, labels, torch.arange(8))
    torch.nn.init.normal_(made.model.layers[-1].weight, std=2.0)  # type: ignore[arg-type]
    after = made.crafted(Whole(made.model, made.classifier), images, labels, torch.arange(8))
    assert (before - after).abs().max() > 1 / 255
    assert (after - images).abs().max() <= 3 * 8 / 255 + 1e-6
    assert made.model.training


def test_purifier_is_trained_and_the_classifier_is_not(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(tmp_path / "base", make_checkpoint(head=False))
    arguments = run_arguments(
        "purifier",
        image_folder,
        tmp_path / "run",
        classifier=tmp_path / "base",  # as `train head` calls it, beside --checkpoint
        epochs=10,
        batch_size=21,
        held_out=9,
        width=16,
        depth=2,
        reach="60/255",
        gamma=0,
        lr=0.02,
        ema=0.8,
        vote=True,
    )
    assert main(arguments) == 0
    said, log = capsys.readouterr().out, read_log(tmp_path / "run")
    assert "on 9 held-out images, with the purifier (without, the vote alone)" in said
    made, before = store.load(tmp_path / "run" / "checkpoint"), store.load(tmp_path / "base")
    assert made.card.purifier == RestorerCard(width=16, depth=2, epsilon=60 / 255, scale=2, times=1.0)
    assert made.card.purifier_training["held_out_bare"]["n"] == 9
    for name, value in before.classifier.state_dict().items():
        assert torch.equal(value, made.classifier.state_dict()[name])
    assert log[-1]["loss"] < log[0]["loss"]
    assert build_defense("restorer", made).vote == Vote()  # as it is served
    assert build_defense("restorer:vote=none", made).vote is None
    assert build_defense("restorer:vote=1", made).vote == Vote(shifts=((-1, -1), (1, 1)))
    assert (
        made.card.purifier_training["at_that_epoch"]["held_out_pgd_accuracy"]
        >= (made.card.purifier_training["held_out_bare"]["pgd_accuracy"])
    )


def test_autoencoder_is_trained_before_a_classifier_and_defends_it(image_folder: Path, tmp_path: Path) -> None:
    store.save(tmp_path / "base", make_checkpoint(head=False))
    given = ["--checkpoint", str(tmp_path / "base"), "--data", str(image_folder), "--out", str(tmp_path / "run")]
    small = ["--width", "8", "--depth", "1", "--epochs", "10", "--batch-size", "17", "--held-out", "9", "--lr", "0.01"]
    how = ["--network", "autoencoder", "--ramp", "0.5", "--ema", "0.8"]
    assert main(["purifier", *given, *small, *how, "--cache", str(tmp_path), "--device", "cpu"]) == 0
    made, log = store.load(tmp_path / "run" / "checkpoint"), read_log(tmp_path / "run")
    assert made.card.purifier == AUTOENCODER
    assert [made.card.purifier_training[name] for name in ("beta", "gamma", "depth")] == [0.0, 0.0, 1]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] > 0.5
    defended = build_defense("restorer", made, gradient="full")
    x = torch.rand(2, 3, 32, 32).requires_grad_()
    assert torch.equal(defended.purify(x.detach()).image, made.purifier.restored(x.detach()))  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(defended(x).sum(), x)
    assert float(gradient.abs().max()) > 0


def test_purifier_begins_with_that_of_another_checkpoint(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, network = make_checkpoint(head=False), Restorer(AUTOENCODER).eval()
    digest = load(str(image_folder), base.card.pictures, cache=tmp_path).digest
    card = dataclasses.replace(
        base.card,
        id="theirs",
        purifier=AUTOENCODER,
        purifier_training={"held_out": 9, "seed": 1, "data_sha256": digest},
    )
    store.save(tmp_path / "base", base)
    store.save(tmp_path / "theirs", dataclasses.replace(base, card=card, purifier=network), half=False)
    given = ["purifier", "--checkpoint", str(tmp_path / "base"), "--data", str(image_folder), "--device", "cpu"]
    little = ["--epochs", "1", "--batch-size", "20", "--held-out", "9", "--lr", "1e-9", "--cache", str(tmp_path)]
    out = ["--out", str(tmp_path / "run")]
    assert main([*given, *little, *out, "--start", str(tmp_path / "base")]) == 2
    assert "has no purifier; train one" in capsys.readouterr().err
    assert main([*given, *little, *out, "--start", str(tmp_path / "theirs"), "--scale", "8"]) == 2
    assert "scale=8: of a fresh network; the card of" in capsys.readouterr().err
    assert main([*given, *little, *out, "--start", str(tmp_path / "theirs")]) == 0
    said = capsys.readouterr().err
    assert "seed=0: the purifier of 'theirs' was trained on" in said
    assert "new to it are those held back by held_out=9, seed=1" in said
    made = store.load(tmp_path / "run" / "checkpoint")
    assert (made.card.id, made.card.purifier) == (base.card.id, AUTOENCODER)
    told = made.card.purifier_training
    assert (told["network"], told["width"], told["beta"]) == ("autoencoder", AUTOENCODER.width, 0.0)
    assert told["start_sha256"] == store.read_card(tmp_path / "theirs").weights_sha256
    assert made.purifier is not None
    pairs = zip(made.purifier.parameters(), network.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=2e-3) for one, other in pairs)


@pytest.mark.parametrize(
    "bad",
    [
        ["--attack-steps", "0"],
        ["--width", "0"],
        ["--width", "7", "--network", "autoencoder"],
        ["--beta", "-1"],
        ["--reach", "8"],
    ],
    ids=" ".join,
)
def test_bad_argument_is_refused(
    bad: list[str], image_folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--checkpoint", str(tiny_folder), "--data", str(image_folder), "--out", str(tmp_path / "run")]
    assert main(["purifier", *folders, "--cache", str(tmp_path), "--device", "cpu", *bad]) == 2
    name = {"reach": "epsilon"}.get(bad[0].strip("-"), bad[0].strip("-").replace("-", "_"))
    assert name in capsys.readouterr().err


def test_state_of_another_classifier_without_a_digest_is_refused(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RobustBench's have none: their ids tell them apart."""

    def load(name: str, **_: object) -> store.Checkpoint:
        made = make_checkpoint(head=False)
        return dataclasses.replace(made, card=dataclasses.replace(made.card, id=name))

    monkeypatch.setattr(store, "load", load)
    small = {"epochs": 1, "batch_size": 21, "held_out": 9, "width": 8, "depth": 1}
    for name, status in (("one", 0), ("other", 2)):
        arguments = run_arguments("purifier", image_folder, tmp_path / "run", checkpoint=name, **small)
        assert main(arguments) == status
        monkeypatch.delattr("unperturb.training.purifier.purifier.measure", raising=False)  # refused before that
    assert "of a run with other checkpoint" in capsys.readouterr().err
