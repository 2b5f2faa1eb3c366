"""`python benchmarks/purifier/samples.py --data DIR`: the page's samples, and how often each of them happens.

Three squares of the shipped drawing of a ship, chosen: `restored`, whose label the page's attack changes and the
purifier brings back; `unrestored`, whose label it does not; `harmed`, called a ship as it is and no longer once it is
purified, without any attack. Of each kind the one that is surest, under the page's attack and under the demo's. None
is an image of the data. How often each happens is counted on the first n test images, attacked as the page does. Both
are written: the result file, and what the page shows of it beside the samples.
"""

import json
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unperturb.benchmarks.command import CheckpointConfig, run_command
from unperturb.benchmarks.purifier.picture import PGD_STEPS, Square, squares
from unperturb.benchmarks.reporting import results
from unperturb.models.attacks.pgd import cross_entropy, pgd
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.files import write_whole
from unperturb.models.options import as_json, option
from unperturb.models.pixels import to_rgb
from unperturb.models.purifiers.defended import DefendedClassifier, defend
from unperturb.models.purifiers.reverse_attack import preset, to_uint8
from unperturb.models.shapes import Float, Int, UInt8
from unperturb.service.demo import EPSILON, PRESET, SAMPLE
from unperturb.service.engine.stages import ATTACK_LOOP
from unperturb.training import data

SCRIPT = "benchmarks/purifier/samples.py"
ASSETS = SAMPLE.parent / "page"
SHOWN = "samples.json"
STRIDE, SMALLEST = 8, 3 / 8  # pixels of the drawing between two squares; the smallest one's share of its side
NEAR = 0.3  # a surer label than this by its margin is changed by neither the attack nor the purifier
SEED = 0  # of the page and of the demo


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(CheckpointConfig):
    """Choose the page's samples, and count how often each of their kinds happens."""

    data: str = option("cifar10, cifar100, or an image folder; its test split is used, in file order")
    n: int = option("test images, the first ones; 0: choose the samples alone", 1000)
    batch: int = option("images in a batch", 125)
    out: Path = option("result file", results.FOLDER / "samples.json")
    page: Path = option("folder of the page's samples", ASSETS)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for negative counts, or a batch of none."""
        if self.n < 0 or self.batch < 1:
            raise ConfigError(f"n={self.n} must be at least 0 and batch={self.batch} at least 1")


class Fate(NamedTuple):
    """By how much the label's score leads (below 0: lags behind another) at each point of an image's way, [n] each."""

    clean: Tensor
    attacked: Tensor
    restored: Tensor
    purified: Tensor  # without an attack

    def kinds(self) -> dict[str, Tensor]:
        """Return how sure each image's fate is, by its kind; 0 and below: it is not of that kind."""
        return {
            "restored": torch.stack([self.clean, -self.attacked, self.restored]).amin(0),
            "unrestored": torch.stack([self.clean, -self.attacked, -self.restored]).amin(0),
            "harmed": torch.minimum(self.clean, -self.purified),
        }


def lead(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the label's score less the best of the others'."""
    scores = logits.detach().softmax(1)
    own = scores.gather(1, labels[:, None])[:, 0]
    return own - scores.scatter(1, labels[:, None], -1.0).amax(1)


def fates(
    defended: DefendedClassifier,
    images: UInt8[Tensor, "n 3 h w"],
    labels: Int[Tensor, " n"],
    *,
    batch: int,
    steps: int = ATTACK_LOOP.steps,
) -> Fate:
    """Attack as the page does: away from what the classifier sees, rounded to 8 bits; purify with and without it."""
    parts = []
    for x8, y in tqdm(list(zip(images.split(batch), labels.split(batch), strict=True)), unit="batch", leave=False):
        x, seeds = x8.float() / 255, torch.full_like(y, SEED)
        with torch.no_grad():
            clean = defended.classifier(x)
        seen = clean.argmax(1)
        if steps == ATTACK_LOOP.steps:
            attacked = ATTACK_LOOP.run(x, cross_entropy(defended.classifier, seen), seeds=seeds).image
            attacked = to_uint8(attacked, x, epsilon=ATTACK_LOOP.epsilon).float() / 255
        else:
            attacked = pgd(defended.classifier, x, seen, epsilon=EPSILON, steps=steps, seeds=seeds)
        after, plain = defended.classify(attacked, seed=seeds), defended.classify(x, seed=seeds)
        logits = (clean, after.unpurified_logits, after.logits, plain.logits)
        parts.append(torch.stack([lead(one, y) for one in logits]))
    return Fate(*torch.cat(parts, 1))


def count(fate: Fate) -> dict[str, int]:
    """Return how many images are classified right, and how many of these are of each kind."""
    kinds = {name: int((sure > 0).sum()) for name, sure in fate.kinds().items()}
    changed = (fate.clean > 0) & (fate.attacked < 0)
    return {"n": len(fate.clean), "right": int((fate.clean > 0).sum()), "changed": int(changed.sum()), **kinds}


def choose(config: SamplesConfig, defended: DefendedClassifier) -> tuple[dict[str, Square], dict[str, int]]:
    """Return the surest square of each kind, under both attacks, and how many there are; ConfigError for none."""
    card = store.read_card(store.resolve(config.checkpoint))
    with Image.open(SAMPLE) as drawing:
        places, cut = squares(to_rgb(drawing), card.pictures, stride=STRIDE, smallest=SMALLEST)
    cut = cut.to(config.device)
    ship = torch.full((len(cut),), card.classes.index("ship"), device=config.device)
    with torch.no_grad():
        clean = torch.cat([lead(defended.classifier(x.float() / 255), ship[: len(x)]) for x in cut.split(config.batch)])
    near = ((clean > 0) & (clean < NEAR)).nonzero()[:, 0]
    by_attack = [
        fates(defended, cut[near], ship[near], batch=config.batch, steps=steps).kinds()
        for steps in (ATTACK_LOOP.steps, PGD_STEPS)
    ]
    surest = {name: torch.minimum(*(kinds[name] for kinds in by_attack)) for name in by_attack[0]}
    if missing := [name for name, sure in surest.items() if not bool((sure > 0).any())]:
        raise ConfigError(f"no part of the drawing is {' or '.join(missing)}: there is nothing to show")
    chosen = {name: places[int(near[int(sure.argmax())])] for name, sure in surest.items()}
    found = {name: int((sure > 0).sum()) for name, sure in surest.items()}
    return chosen, {"n": len(cut), "right": int((clean > 0).sum()), **found}


def write_page(folder: Path, chosen: dict[str, Square], shown: dict[str, Any]) -> None:
    """Write the samples, cut from the drawing, and what the page says of them."""
    with Image.open(SAMPLE) as opened:
        drawing = to_rgb(opened)
    for name, at in chosen.items():
        piece = BytesIO()
        drawing.crop((at.left, at.top, at.left + at.side, at.top + at.side)).save(piece, "PNG")
        write_whole(folder / f"{name}.png", piece.getvalue())
    write_whole(folder / SHOWN, f"{json.dumps(shown, indent=1)}\n".encode())


def make_samples(config: SamplesConfig) -> int:
    """Choose, count, and write the samples and the result file."""
    loaded = store.load(config.checkpoint, device=config.device)
    defended = defend(loaded, preset(PRESET))
    shown: dict[str, Any] = {"model": loaded.card.id, "data": None, "counts": None}
    if config.n:
        dataset = data.load(config.data, loaded.card.pictures, cache=config.cache)
        images, labels = (t[: config.n].to(config.device) for t in dataset.test)
        shown |= {"data": dataset.name, "counts": count(fates(defended, images, labels, batch=config.batch))}
    chosen, of_drawing = choose(config, defended)
    shown["drawing"] = of_drawing
    write_page(config.page, chosen, shown)
    if config.n:
        places = {name: at._asdict() for name, at in chosen.items()}
        stored = {name: value for name, value in as_json(config).items() if name != "page"}
        found = {**shown, "chosen": places}
        results.write(config.out, script=SCRIPT, config={**stored, "seed": SEED, "data": shown["data"]}, results=found)
    print(shown)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(SamplesConfig, make_samples, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
