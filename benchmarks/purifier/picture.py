"""`python benchmarks/purifier/picture.py --data DIR`: how often the purifier brings a label back, and such an image.

On the first n test images, by the preset `transfer` and PGD-20 on the classifier alone: how many labels the attack
changes, how many of these the purifier brings back, and how many right ones it spoils, attacked and not. What is drawn
is no image of the data, but a square cut from the shipped drawing of a ship: of all squares whose label is brought back
the one of which the classifier is surest, both wrongly when attacked and rightly when purified. It is a chosen image.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from unperturb.benchmarks.command import BenchmarkConfig, run_command
from unperturb.benchmarks.purifier import points
from unperturb.benchmarks.reporting import results
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.models.pixels import Preprocessing, to_rgb, to_size
from unperturb.models.purifiers.defended import DefendedClassifier, defend
from unperturb.models.purifiers.reverse_attack import preset
from unperturb.models.shapes import UInt8
from unperturb.service.demo import EPSILON, PRESET, SAMPLE, run_demo
from unperturb.training import data

PGD_STEPS = 20
STRIDE = 16  # pixels of the drawing between two squares

SCRIPT = "benchmarks/purifier/picture.py"


@dataclass(frozen=True, kw_only=True)
class PictureConfig(BenchmarkConfig):
    """Count the labels that the purifier brings back, and draw an image of which it does."""

    data: str = option("cifar10, cifar100, or an image folder; its test split is used, in file order")
    n: int = option("test images, the first ones", 1000)
    batch: int = option("images in a batch", 125)
    out: Path = option("result file; the picture lies beside it", results.FOLDER / "brought_back.json")
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for counts below 1."""
        if self.n < 1 or self.batch < 1:
            raise ConfigError(f"n={self.n} and batch={self.batch} must be at least 1")


class Square(NamedTuple):
    """A square of the drawing, in its pixels."""

    side: int
    left: int
    top: int


def scores(defended: DefendedClassifier, images: Iterable[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Return the class probabilities of batches of images, without and with the purifier."""
    answers = [defended.classify(x, seed=seed) for x in images]
    plain, purified = ([getattr(a, name) for a in answers] for name in ("unpurified_logits", "logits"))
    return torch.cat(plain).softmax(1), torch.cat(purified).softmax(1)


def count(
    config: PictureConfig, defended: DefendedClassifier, images: Tensor, labels: Tensor
) -> tuple[dict[str, int], list[int]]:
    """Return the counts, and the images that are brought back, the surest first."""
    made = points.make_points(
        defended.classifier, images, labels, epsilon=EPSILON, steps=PGD_STEPS, seed=config.seed, batch=config.batch
    )
    clean, untouched = (found.argmax(1) for found in scores(defended, made.clean.split(config.batch), config.seed))
    attacked, purified = scores(defended, made.attacked.split(config.batch), config.seed)
    right = clean == labels
    changed = right & (attacked.argmax(1) != labels)
    back = changed & (purified.argmax(1) == labels)
    spoiled = (attacked.argmax(1) == labels) & (purified.argmax(1) != labels)
    sure = torch.minimum(attacked.amax(1), purified.amax(1)).masked_fill(~back, -1)
    counts = {
        "n": len(labels),
        "right": int(right.sum()),
        "changed_by_attack": int(changed.sum()),
        "brought_back": int(back.sum()),
        "spoiled": int(spoiled.sum()),
        "spoiled_clean": int((right & (untouched != labels)).sum()),
    }
    return counts, sure.argsort(descending=True)[: counts["brought_back"]].tolist()


def squares(
    drawing: Image.Image, how: Preprocessing, *, stride: int = STRIDE, smallest: float = 1 / 2
) -> tuple[list[Square], UInt8[Tensor, "n 3 h w"]]:
    """Return squares cut from a drawing, from that share of it to the whole, at the model's size; and their places."""
    whole = min(drawing.size)
    places = [
        Square(side, left, top)
        for side in range(int(whole * smallest), whole + 1, stride)
        for left in range(0, drawing.width - side + 1, stride)
        for top in range(0, drawing.height - side + 1, stride)
    ]
    cut = (drawing.crop((at.left, at.top, at.left + at.side, at.top + at.side)) for at in places)
    return places, torch.stack([pil_to_tensor(to_size(piece, how)) for piece in cut])


def draw(
    config: PictureConfig, defended: DefendedClassifier, loaded: Checkpoint, images: Tensor, chosen: list[int]
) -> int:
    """Draw the first of the chosen images to which the demo's own attack does the same; return its number."""
    for index in chosen:
        lines = run_demo(
            defended,
            loaded.card,
            images[index : index + 1].float() / 255,
            seed=config.seed,
            out=config.out.with_suffix(".png"),
        )
        original, attacked, purified = (line.split(": ")[1].rsplit(" ", 1)[0] for line in list(lines)[:3])
        if original == purified != attacked:
            return index
    raise ConfigError("the label of none of the images is brought back: there is nothing to draw")


def draw_picture(config: PictureConfig) -> int:
    """Count, draw, and write the result file."""
    loaded = store.load(config.checkpoint, device=config.device)
    dataset = data.load(config.data, loaded.card.pictures, cache=config.cache)
    images, labels = (t[: config.n].to(config.device) for t in dataset.test)
    defended = defend(loaded, preset(PRESET))
    counts, _ = count(config, defended, images, labels)
    with Image.open(SAMPLE) as drawing:
        places, cut = squares(to_rgb(drawing), loaded.card.pictures)
    ship = torch.full((len(cut),), loaded.card.classes.index("ship"), device=config.device)
    of_drawing, chosen = count(config, defended, cut.to(config.device), ship)
    drawn = places[draw(config, defended, loaded, cut.to(config.device), chosen)]
    found = {"preset": PRESET, **counts, "drawing": {**of_drawing, "drawn": drawn._asdict()}}
    results.write(config.out, script=SCRIPT, config={**as_json(config), "data": dataset.name}, results=found)
    print(found)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(PictureConfig, draw_picture, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
