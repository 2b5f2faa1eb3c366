"""The noise generator: bounds, its own noise for each image, its checkpoint, and its training."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_checkpoint
from tests.support.checkpoints import CARDS, with_readout
from tests.support.training import assert_lowered, run_arguments
from unperturb.models.checkpoints import store
from unperturb.models.contrastive.views import make_views
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.networks import generator
from unperturb.models.networks.generator import GeneratorCard, NoiseGenerator
from unperturb.models.provenance import digest_of
from unperturb.training.__main__ import main
from unperturb.training.contrastive.contrast import POLICY
from unperturb.training.contrastive.false_negatives import Kind
from unperturb.training.data import Split
from unperturb.training.purifier.generator import GeneratorConfig, GeneratorTask
from unperturb.training.world import World


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    card = GeneratorCard(id="g", epsilon=0.1, width=8, classifier_sha256=("a", "a"))
    generator.save(tmp_path / "g", NoiseGenerator(width=8, epsilon=0.1), card)
    return tmp_path / "g"


def test_noise_stays_within_epsilon_and_the_image_within_its_range(images: torch.Tensor) -> None:
    made = NoiseGenerator(width=8, epsilon=8 / 255)
    made.last.weight.data.mul_(1000)  # as far as tanh goes
    moved = made(images)
    assert (moved - images).abs().max() <= 8 / 255 + 1e-6
    assert (moved - images).abs().max() > 7.9 / 255
    assert 0 <= moved.min() <= moved.max() <= 1


def test_an_images_noise_does_not_depend_on_its_batch(images: torch.Tensor) -> None:
    made = NoiseGenerator(width=8, epsilon=0.1)
    assert torch.allclose(made.noise(images)[5], made.noise(images[5:6])[0], atol=1e-5)


def test_round_trip(saved: Path, images: torch.Tensor) -> None:
    loaded, card = generator.load(saved)
    assert card.width == 8
    assert card.classifier_sha256 == ("a", "a")
    assert loaded(images).shape == images.shape
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_altered_and_foreign_folders_are_refused(saved: Path, tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="not a generator's card"):
        generator.load(tiny_folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        generator.load(saved / "nowhere")
    card = saved / store.CARD
    good = json.loads(card.read_text())
    card.write_text(json.dumps({**good, "width": 7}))
    with pytest.raises(CheckpointError, match="width=7"):
        generator.load(saved)
    card.write_text(json.dumps({**good, "weights_sha256": "0"}))
    with pytest.raises(CheckpointError, match="SHA-256"):
        generator.load(saved)


@pytest.mark.parametrize("bad", [{"width": 9, "epsilon": 0.1}, {"width": 8, "epsilon": 8.0}], ids=str)
def test_what_cannot_be_built_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"width=9|epsilon=8"):
        NoiseGenerator(width=int(bad["width"]), epsilon=bad["epsilon"])


@pytest.mark.parametrize("kind", ["keep", "labels"])
def test_loss_is_infonce_with_all_positives_in_one(kind: Kind, images: torch.Tensor, tmp_path: Path) -> None:
    """Kim et al. 2020, eq. 2, of the image, a view and the attacked image; the oracle leaves out an image's class."""
    classifier, made = make_checkpoint().classifier, NoiseGenerator(width=8, epsilon=0.1)
    split = Split((images * 255).byte(), torch.arange(8) % 3)
    config = GeneratorConfig(
        data="x", out=tmp_path, classifier="x", temperature=0.4, false_negatives=kind, false_negatives_from=1
    )
    task = GeneratorTask(config, classifier, made, split, split, World(0, 1, torch.device("cpu")))
    indices = torch.tensor([6, 0, 3, 5, 1])
    x = split.images[indices] / 255
    view = make_views(x, seeds=2 * (1 << 32) + indices, step=0, views=1, policy=POLICY)[:, 0]
    with torch.no_grad():
        features = torch.stack([classifier.features(one) for one in (x, view, made(x))], 1).double()
    z, terms = F.normalize(features, dim=2).numpy(), []
    for i, j in itertools.product(range(5), range(3)):
        against = [
            n for n in range(5) if n != i and (kind == "keep" or split.labels[indices[n]] != split.labels[indices[i]])
        ]
        positive = sum(np.exp(z[i, j] @ z[i, other] / 0.4) for other in range(3) if other != j)
        terms.append(np.log1p(np.exp(z[against].reshape(-1, z.shape[2]) @ z[i, j] / 0.4).sum() / positive))
    loss, figures = task.loss(indices, 2, 0)
    assert abs(-loss.item() - np.mean(terms)) < 1e-5
    assert ("precision" in figures) == (kind == "labels")


def test_training_moves_the_features_and_leaves_the_classifier_as_it_was(image_folder: Path, tmp_path: Path) -> None:
    store.save(tmp_path / "base", make_checkpoint())
    before = digest_of(store.load(tmp_path / "base").classifier)
    out = tmp_path / "run"
    arguments = run_arguments(
        "generator",
        image_folder,
        out,
        classifier=tmp_path / "base",
        epochs=6,
        batch_size=21,
        held_out=9,
        width=8,
        lr=1e-2,
    )
    assert main(arguments) == 0
    _, card = generator.load(out / "generator")
    assert card.classifier_sha256 == (before, before)
    assert_lowered(out, "loss", "cosine")  # the loss is less the contrastive one, which is raised
    assert card.figures["test"]["n"] == 18


def test_encoder_without_a_readout_is_refused(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(tmp_path / "base", with_readout(CARDS["none"]))
    arguments = run_arguments("generator", image_folder, tmp_path / "run", classifier=tmp_path / "base")
    assert main(arguments) == 2
    assert "without a classifier" in capsys.readouterr().err
