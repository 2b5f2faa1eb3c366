"""The figures of the first page: the headline, and the picture that is chosen for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from unperturb.benchmarks.purifier import picture
from unperturb.benchmarks.reporting.first_page import headline
from unperturb.models.attacks.pgd import pgd
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import preset
from unperturb.service.demo import EPSILON

CONFIG = picture.PictureConfig(data="nowhere", n=6, batch=4, device="cpu")


def measured() -> dict[str, Any]:
    def cell(accuracy: float, gain: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "n": 1000, "gain": {"mean": gain, "interval": [gain - 0.01, gain + 0.01]}}

    cells = {
        name: {"attacked": cell(a, 0.1), "clean": cell(0.7, -0.02)}
        for name, a in (("classifier", 0.4), ("default", 0.5))
    }
    return {"config": {"steps": 20}, "results": {"accuracy": cells}}


def test_headline_pairs_the_worst_attack_without_with_the_full_gradient_through_the_purifier() -> None:
    bare = {"results": {"indices": [0, 1, 2, 3], "outcomes": {"clean": [1, 1, 1, 1], "autoattack": [1, 1, 0, 1]}}}
    behind = {"results": {"indices": [0, 1, 2, 3], "outcomes": {"clean": [1, 1, 1, 1], "unrolled": [0, 1, 0, 0]}}}
    text = headline(bare, measured(), behind)
    assert "40.0% of the images withstand without it, 50.0% with it: **+10.0 (+9.0 to +11.0) points**" in text
    assert "75.0% withstand every attack" in text
    assert "25.0% the full gradient with it: **-50.0" in text
    assert "On **clean** images (n = 1,000): -2.0" in text


def test_headline_refuses_runs_of_other_images() -> None:
    run = {"results": {"indices": [0], "outcomes": {"clean": [1], "unrolled": [1]}}}
    other = {"results": {"indices": [1], "outcomes": {"clean": [1], "unrolled": [1]}}}
    with pytest.raises(ValueError, match="other images"):
        headline(run, measured(), other)


def test_counts_are_those_of_the_attacks_own_points() -> None:
    loaded = store.load("default")
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = loaded.classifier(images.float() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # one that the classifier has wrong
    defended = defend(loaded, preset("default"))
    counts, chosen = picture.count(CONFIG, defended, images, labels)
    attacked = pgd(
        loaded.classifier,
        images.float() / 255,
        labels,
        epsilon=EPSILON,
        step_size=EPSILON / 4,
        steps=picture.PGD_STEPS,
        seeds=torch.arange(6),
    )
    answer = defended.classify(attacked, seed=0)
    withstood, back = answer.unpurified_logits.argmax(1) == labels, answer.logits.argmax(1) == labels
    changed = [i for i in range(1, 6) if not withstood[i]]
    assert counts["n"] == 6
    assert counts["right"] == 5
    assert counts["changed_by_attack"] == len(changed)
    assert sorted(chosen) == [i for i in changed if back[i]]
    assert counts["brought_back"] == len(chosen)
    assert counts["spoiled"] == int((withstood & ~back).sum())


def test_picture_is_of_the_first_image_that_the_demo_brings_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        0.0: ["original: cat 90%", "attacked: cat 80%", "purified: cat 85%", "wrote it"],
        1.0: ["original: cat 90%", "attacked: dog 80%", "purified: cat 85%", "wrote it"],
    }

    def run_demo(defended: object, card: object, x: torch.Tensor, **given: object) -> Iterator[str]:
        yield from lines[float(x.max())]

    monkeypatch.setattr(picture, "run_demo", run_demo)
    loaded = store.load("default")
    defended = defend(loaded, preset("default"))
    images = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    assert picture.draw(CONFIG, defended, loaded, images, [1, 2, 0]) == 2
    with pytest.raises(ConfigError, match="nothing to draw"):
        picture.draw(CONFIG, defended, loaded, images, [0, 1])


def test_squares_are_cut_where_they_say_from_whole_to_half() -> None:
    drawing = Image.effect_noise((64, 64), 80).convert("RGB")
    places, cut = picture.squares(drawing, 32)
    assert cut.shape == (len(places), 3, 32, 32)
    assert {at.side for at in places} == {32, 48, 64}
    at = next(i for i, place in enumerate(places) if place == (32, 16, 32))
    assert torch.equal(cut[at], pil_to_tensor(drawing.crop((16, 32, 48, 64))))
