"""The small things that several tests need: a tiny checkpoint, images, an image folder."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unperturb.models.attacks.projected_gradient import RAMP, ProjectedGradient
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card, HeadCard
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.networks.classifier import Architecture
from unperturb.models.networks.head import NegativesBank, ProjectionHead
from unperturb.models.networks.registry import build
from unperturb.models.networks.restorer import Restorer, RestorerCard
from unperturb.models.purifiers.defended import DefendedClassifier
from unperturb.models.purifiers.reverse_attack import ReverseAttack, ReverseAttackConfig

os.environ.setdefault("UNPERTURB_EXECUTION", "eager")  # of services that tests start: nothing is compiled beside them
os.environ.setdefault("UNPERTURB_THREADS", "1")  # nor do they take the cores of the tests that run beside them

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script, which programs inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(min(2, torch.get_num_threads()))

CLASSES = ("blue", "green", "red")
RESTORER = RestorerCard(width=4, depth=2, epsilon=8 / 255)
SMALL = Architecture(name="wide_resnet_10_1", num_classes=3, activation="silu")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Leaves torch's threads as they were, whatever a command has set."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_log() -> Iterator[None]:
    """Takes away what a command has set up to log by: it writes to a stream that ends with the test."""
    log = logging.getLogger()
    before = log.handlers[:]
    yield
    for handler in log.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            log.removeHandler(handler)


@pytest.fixture
def one_thread(same_threads: None) -> None:
    """For work so small that two threads wait for each other, many times as long where the cores are busy."""
    torch.set_num_threads(1)


def make_checkpoint(*, head: bool = True, architecture: Architecture = SMALL) -> Checkpoint:
    """Random weights with BatchNorm statistics that are not the initial ones, so that modes can be told apart."""
    torch.manual_seed(1)
    classifier = build(architecture)
    projection = ProjectionHead(feature_dim=classifier.feature_dim, hidden=8, embedding_dim=4)
    for module in (*classifier.modules(), *projection.modules()):
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    card = Card(id="tiny", architecture=architecture, classes=CLASSES, data={"name": "none"}, training={"by": "test"})
    if not head:
        return Checkpoint(card, classifier.requires_grad_(False))
    card = Card(**{**vars(card), "head": HeadCard(hidden=8, embedding_dim=4, temperature=0.2), "restorer": RESTORER})
    bank = NegativesBank(torch.randn(40, 4), torch.arange(40) % 3)
    restorer = Restorer(RESTORER).eval()
    for layer in restorer.layers:
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.mul_(3)  # so that it has an opinion of every pixel
    for module in (projection, restorer):
        module.eval().requires_grad_(False)
    return Checkpoint(card, classifier.requires_grad_(False), projection, bank, restorer)


def make_config(*, steps: int = 3, views: int = 2, epsilon: float = 8 / 255) -> ReverseAttackConfig:
    loop = ProjectedGradient(
        direction="descend", epsilon=epsilon, step_size=2 / 255, steps=steps, start="uniform", ramp=RAMP
    )
    return ReverseAttackConfig(loop=loop, views=views)


def make_defended(config: ReverseAttackConfig | None = None) -> DefendedClassifier:
    tiny = make_checkpoint()
    assert tiny.head is not None
    assert tiny.bank is not None
    purifier = ReverseAttack(tiny.classifier, tiny.head, tiny.bank, config or make_config(), tiny.restorer)
    return DefendedClassifier(tiny.classifier, purifier)


@pytest.fixture
def images() -> torch.Tensor:
    return make_images()


def make_images() -> torch.Tensor:
    """Eight 8-bit images in [0, 1] with structure, not only noise."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(8, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint with a head."""
    folder = tmp_path_factory.mktemp("tiny")
    store.save(folder, make_checkpoint())
    return folder


def write_image_folder(root: Path, *, train: int = 24, test: int = 6, size: int = 32) -> Path:
    """An image folder whose classes are the dominant colour: learnable in a few steps."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
                pixels[:, :, channel] += 120
                Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def engines(tiny_folder: Path) -> Iterator[Callable[..., Any]]:
    from tests.support.engines import starting  # what computes is tested without the service's packages, too

    with starting(tiny_folder) as make:
        yield make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.support.browser import opened

    with opened() as browser:
        yield browser


@pytest.fixture(scope="module")
def client(tiny_folder: Path) -> Iterator[Any]:
    from tests.support.serving import serving

    with serving(tiny_folder) as opened:
        yield opened
