"""The shipped checkpoints, on real images where they are at hand."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.support.pictures import encode
from tests.support.real_images import first_test_images, real_images
from tests.support.serving import wait_until_ready
from unperturb.benchmarks.purifier.samples import ASSETS, SHOWN
from unperturb.models.checkpoints import store
from unperturb.service.http.app import create_app
from unperturb.service.settings import Settings

FLOORS = {
    "default": (0.75, 0.46),
    "small": (0.65, 0.36),
    "cifar10-natural": (0.925, 0.0),
    "cifar100": (0.46, 0.22),
}  # clean and PGD-20, all test images


@contextmanager
def serving(checkpoint: str) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(checkpoint=checkpoint, device="cpu", patience=1e6, timeout_s=1000.0))) as made:
        wait_until_ready(made)
        yield made


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving("default") as opened:
        yield opened


@pytest.fixture(scope="module")
def test_images() -> tuple[list[bytes], list[int]]:
    """The first 1,000 test images of CIFAR-10."""
    return posted("cifar10")


def posted(dataset: str) -> tuple[list[bytes], list[int]]:
    """The first 1,000 real test images as PNG files, and their labels."""
    images, labels = first_test_images(dataset, 1000)
    return [encode(Image.fromarray(image)) for image in images], labels


@pytest.mark.parametrize(
    ("name", "attack", "labels"),
    [
        ("restored", True, ("ship", "other", "ship")),
        ("unrestored", True, ("ship", "other", "other")),
        ("harmed", False, ("ship", None, "other")),
    ],
)
def test_samples_of_the_page_do_what_it_says_of_them(
    client: TestClient, name: str, attack: bool, labels: tuple[str | None, ...]
) -> None:
    payload = (ASSETS / f"{name}.png").read_bytes()
    answer = client.post(f"/inspect?attack={attack}&preset=transfer", files={"image": payload}).json()
    assert answer["model"]["id"] == json.loads((ASSETS / SHOWN).read_text())["model"]
    seen = (
        answer[point] and answer[point]["predictions"][0]["label"] for point in ("original", "attacked", "purified")
    )
    assert tuple(label if label in ("ship", None) else "other" for label in seen) == labels


def test_every_shipped_checkpoint_has_its_floors() -> None:
    assert set(store.shipped_names()) == set(FLOORS)
    assert sum(file.stat().st_size for file in store.PRETRAINED.rglob("*") if file.is_file()) <= 48e6


@pytest.mark.parametrize("checkpoint", FLOORS)
def test_it_ships_whole_with_the_figures_that_it_must_have(checkpoint: str) -> None:
    loaded = store.load(checkpoint)
    assert loaded.bank is not None
    assert 1000 <= len(loaded.bank.labels) <= 4000
    test, (clean, pgd) = loaded.card.figures["test"], FLOORS[checkpoint]
    assert test["n"] == 10_000
    assert test["clean_accuracy"] >= clean
    assert test["pgd_accuracy"] >= pgd
    measured = loaded.card.figures["purification"]
    if not pgd:  # never trained against attacks: there the steps harm, which its card says
        assert measured["vote"]["clean"]["gain"]["mean"] >= 0
        assert measured["transfer"]["clean"]["gain"]["interval"][1] < 0
        return
    for preset, most_lost in (("default", 0.005), ("transfer", 0.02)):
        assert measured[preset]["attacked"]["n"] == 1000
        least = 0.01 if (checkpoint, preset) == ("cifar100", "default") else 0.05
        assert measured[preset]["attacked"]["gain"]["mean"] >= least
        assert measured[preset]["clean"]["gain"]["mean"] >= -most_lost


def share_of_right_answers(client: TestClient, files: list[bytes], labels: list[int], purify: str) -> float:
    def predict(payload: bytes) -> int:
        answer = client.post(f"/classify?purify={purify}", content=payload, headers={"content-type": "image/png"})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["predictions"][0]["index"])

    with ThreadPoolExecutor(32) as pool:
        return float(np.mean(np.array(list(pool.map(predict, files))) == np.array(labels)))


def stated(checkpoint: str, preset: str) -> float:
    figures = store.read_card(store.resolve(checkpoint)).figures["purification"]
    return float(figures[preset]["clean"]["accuracy"])


@real_images
@pytest.mark.parametrize(("purify", "preset"), [("always", "default"), ("never", "classifier")])
def test_posted_images_give_the_accuracy_that_the_card_states(
    client: TestClient, test_images: tuple[list[bytes], list[int]], purify: str, preset: str
) -> None:
    assert abs(share_of_right_answers(client, *test_images, purify) - stated("default", preset)) <= 0.005


@real_images
@pytest.mark.parametrize("checkpoint", [name for name in FLOORS if name != "default"])
@pytest.mark.parametrize(
    ("purify", "preset"), [pytest.param("always", "default", marks=pytest.mark.slow), ("never", "classifier")]
)
def test_images_posted_to_the_others_give_the_accuracy_that_their_cards_state(
    checkpoint: str, purify: str, preset: str
) -> None:
    images = posted(store.read_card(store.resolve(checkpoint)).data["name"])
    with serving(checkpoint) as client:
        assert abs(share_of_right_answers(client, *images, purify) - stated(checkpoint, preset)) <= 0.005


@real_images
@pytest.mark.parametrize(
    ("preset", "count", "tolerance"), [("default", 32, 1e-4), ("transfer", 32, 1e-4), ("published", 8, 1e-3)]
)
def test_image_alone_and_among_others_gets_the_same_scores(
    client: TestClient, test_images: tuple[list[bytes], list[int]], preset: str, count: int, tolerance: float
) -> None:
    files, _ = test_images

    def scores(payload: bytes) -> dict[int, float]:
        answer = client.post(f"/classify?preset={preset}&top_k=10", files={"image": payload})
        return {p["index"]: p["score"] for p in answer.json()["predictions"]}

    alone = [scores(payload) for payload in files[:4]]
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(scores, files[:count]))
    for one, other in zip(alone, together, strict=False):
        assert max(abs(one[i] - other[i]) for i in one) < tolerance
