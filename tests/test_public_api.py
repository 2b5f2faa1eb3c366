"""The public names of `unperturb`, and the programs of examples/."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

import unperturb
from tests.conftest import make_checkpoint
from tests.support.serving import photo
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.decoding.decode import decode

ROOT = Path(__file__).parents[1]


def test_import_is_light_and_every_public_name_is_there() -> None:
    script = (
        "import sys, unperturb; assert 'torch' not in sys.modules; [getattr(unperturb, n) for n in unperturb.__all__]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert set(unperturb.__all__) <= set(dir(unperturb))
    assert unperturb.presets() == tuple(PRESETS)
    with pytest.raises(AttributeError, match="nonsense"):
        unperturb.nonsense  # noqa: B018


@pytest.mark.parametrize("preset", [name for name, one in PRESETS.items() if not one.restores])
def test_defended_module_gives_what_the_service_answers(client: TestClient, preset: str, tiny_folder: Path) -> None:
    how = unperturb.load(tiny_folder).card.pictures
    sent = photo(3)
    model = unperturb.defend(unperturb.load(tiny_folder), preset=preset, seed=5)
    images = torch.from_numpy(decode(sent, how, max_pixels=10**6).pixels)[None].float() / 255
    with torch.no_grad():
        expected = model(images)[0].softmax(0).numpy()
    answer = client.post(
        f"/classify?preset={preset}&seed=5&top_k=3",
        content=sent,
        headers={"content-type": "image/png", "authorization": "Bearer user's"},
    )
    assert answer.status_code == 200, answer.text
    scores = {entry["label"]: entry["score"] for entry in answer.json()["predictions"]}
    found = [scores[name] for name in unperturb.load(tiny_folder).card.classes]
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_full_gradient_goes_through_the_steps_and_the_others_do_not(images: torch.Tensor) -> None:
    tiny = make_checkpoint()
    gradients = {}
    for gradient in ("full", "bpda"):
        x = images[:2].clone().requires_grad_()
        model = unperturb.defend(tiny, preset="transfer", gradient=gradient)
        (gradients[gradient],) = torch.autograd.grad(model(x).square().sum(), x)
        assert gradients[gradient].isfinite().all()
    assert not torch.allclose(gradients["full"], gradients["bpda"])
    x = images[:2].clone().requires_grad_()
    assert not unperturb.defend(tiny, preset="transfer", gradient="none")(x).requires_grad
    scores = [unperturb.defend(tiny, preset="transfer", gradient=g)(images[:2]) for g in ("full", "bpda", "none")]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_purified_images_are_near_and_seeded(images: torch.Tensor) -> None:
    tiny = make_checkpoint()
    purified, trace = unperturb.purify(tiny, images, preset="transfer", seed=1)
    loop = PRESETS["transfer"].loop
    assert float((purified - images).abs().max()) <= loop.epsilon + 1e-6
    assert trace.losses.shape == (loop.steps, 8)
    own, other = (defend(tiny, PRESETS["transfer"]).purify(images, seed=seed) for seed in (1, 2))
    assert torch.equal(purified, own.image)
    assert torch.equal(trace.loss_before, own.trace.loss_before)
    assert not torch.equal(purified, other.image)


REFUSED = """
import torch, unperturb
tiny = unperturb.load(FOLDER)
cases = {
    "divide 8-bit ones by 255": lambda: unperturb.purify(tiny, torch.full((1, 3, 32, 32), 200.0)),
    "pixels are needed in": lambda: unperturb.purify(tiny, torch.full((1, 3, 32, 32), float("nan"))),
    "[batch, 3, 32, 32], is needed": lambda: unperturb.purify(tiny, torch.zeros(3, 32, 32)),
    "images of shape [2, 3, 48, 64]": lambda: unperturb.defend(tiny)(torch.zeros(2, 3, 48, 64)),
    "images.to(torch.float32) / 255": lambda: unperturb.defend(tiny)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
    "images.to(torch.float32) makes": lambda: unperturb.defend(tiny)(torch.zeros(1, 3, 32, 32, dtype=torch.float64)),
    "images are a ndarray": lambda: unperturb.purify(tiny, torch.zeros(1, 3, 32, 32).numpy()),
    "default, vote, transfer, restorer, published": lambda: unperturb.defend(tiny, preset="nonsense"),
    "full, bpda, none": lambda: unperturb.defend(tiny, gradient="nonsense"),
}
for message, call in cases.items():
    try:
        call()
    except unperturb.ConfigError as error:
        assert message in str(error), (message, error)
    else:
        raise AssertionError(message)
"""


def test_what_cannot_be_purified_is_refused_by_name(tiny_folder: Path) -> None:
    """In a process of its own, where no shape is checked by the tests' plugin first."""
    subprocess.run([sys.executable, "-c", REFUSED.replace("FOLDER", repr(str(tiny_folder)))], check=True)
    with pytest.raises(unperturb.CheckpointError, match="no head"):
        unperturb.defend(make_checkpoint(head=False))


@pytest.mark.timeout(900)  # one trains a classifier and a purifier: minutes of a core
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("classify_and_purify.py", "InfoNCE"),
        ("attack_the_defense.py", "defended: "),
        ("own_purifier.py", "model + Smoother"),
        ("own_classifier.py", "restorer "),
    ],
)
def test_example_runs(program: str, said: str, tmp_path: Path) -> None:
    file = ROOT / "examples" / program
    assert len(file.read_text().splitlines()) < 90
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout
