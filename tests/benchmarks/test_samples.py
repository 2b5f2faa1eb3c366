"""The page's samples: what they are cut from, and how often what they show happens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unperturb.benchmarks.purifier import samples
from unperturb.benchmarks.purifier.picture import Square
from unperturb.benchmarks.purifier.samples import Fate, SamplesConfig, count, fates, lead, write_page
from unperturb.benchmarks.reporting import results
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import preset
from unperturb.service.demo import SAMPLE


def test_lead_is_the_labels_score_less_the_best_other_one() -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    assert torch.allclose(lead(scores.log(), torch.tensor([0, 2])), torch.tensor([0.5, -0.6]))


def test_each_kind_is_counted_among_those_that_are_right() -> None:
    #                             restored, unrestored, withstands, harmed, wrong at first
    fate = Fate(
        clean=torch.tensor([0.3, 0.3, 0.3, 0.3, -0.1]),
        attacked=torch.tensor([-0.2, -0.2, 0.1, 0.1, -0.5]),
        restored=torch.tensor([0.1, -0.1, 0.1, 0.1, 0.5]),
        purified=torch.tensor([0.3, 0.3, 0.3, -0.2, -0.2]),
    )
    assert count(fate) == {"n": 5, "right": 4, "changed": 2, "restored": 1, "unrestored": 1, "harmed": 1}
    assert fate.kinds()["restored"][0] == pytest.approx(0.1)


def test_images_go_the_way_of_the_page() -> None:
    loaded = store.load("small")
    defended = defend(loaded, preset("default"))
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.classifier(images.float() / 255)
    labels = logits.argmax(1)
    fate = fates(defended, images, labels, batch=2)
    assert torch.allclose(fate.clean, lead(logits, labels), atol=1e-5)
    assert bool((fate.attacked < fate.clean).all())
    plain = defended.classify(images.float() / 255, seed=0)
    assert torch.allclose(fate.purified, lead(plain.logits, labels), atol=1e-4)


def test_samples_are_cut_from_the_drawing_and_their_figures_are_those_of_the_result_file(tmp_path: Path) -> None:
    write_page(tmp_path, {"restored": Square(side=40, left=8, top=16)}, {"counts": None})
    with Image.open(SAMPLE) as drawing, Image.open(tmp_path / "restored.png") as piece:
        whole = np.asarray(drawing.convert("RGB"))
        assert np.array_equal(np.asarray(piece), whole[16:56, 8:48])
    shown = json.loads((samples.ASSETS / samples.SHOWN).read_text())
    stored = results.FOLDER / "samples.json"
    found = json.loads(stored.read_text())["results"] if stored.is_file() else {"counts": None, "data": None}
    assert (shown["counts"], shown["data"]) == (found["counts"], found["data"])
    for name in ("restored", "unrestored", "harmed"):
        with Image.open(samples.ASSETS / f"{name}.png") as opened:
            piece_of_page = np.asarray(opened)
        windows = np.lib.stride_tricks.sliding_window_view(whole, piece_of_page.shape)[::8, ::8, 0]
        assert any(np.array_equal(one, piece_of_page) for row in windows for one in row), name
        assert shown["drawing"][name] > 0


def test_drawing_without_such_a_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def withstands(defended: object, images: torch.Tensor, labels: torch.Tensor, **_: object) -> Fate:
        return Fate(*torch.full((4, len(labels)), 0.5))

    monkeypatch.setattr(samples, "fates", withstands)
    monkeypatch.setattr(samples, "STRIDE", 64)
    config = SamplesConfig(data="nowhere", n=0, device="cpu")
    with pytest.raises(ConfigError, match="no part of the drawing is restored or unrestored or harmed"):
        samples.choose(config, defend(store.load("small"), preset("default")))


def test_seed_of_the_samples_is_the_pages_and_no_option() -> None:
    with pytest.raises(SystemExit):
        samples.main(["--data", "nowhere", "--seed", "1"])
