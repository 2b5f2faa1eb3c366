"""`unperturb assess CHECKPOINT --data DIR`: does the purifier help this model, on these images?

Each preset that the checkpoint has the parts for is measured before it on random test images: clean loss, gain against
an attacker who does not know of it (transfer), gain in the worst case against one who does (full gradient), and time.
The last line is the verdict in words.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting.assessment import assessment, judged_presets, summary
from unperturb.benchmarks.reporting.results import write
from unperturb.benchmarks.reporting.sections import Summary
from unperturb.benchmarks.robustness.data import load_images
from unperturb.benchmarks.robustness.evaluate import evaluate
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.models.purifiers.base import lacking
from unperturb.models.purifiers.defended import presets_of
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.training.data import at_once

SCRIPT = "unperturb assess"
PIXELS_AT_ONCE = 1 << 18  # 5 images of 224 pixels: the full gradient keeps every layer of every view
MOST_STEPS = 10  # of a preset that is measured unasked: the full gradient goes through every one


@dataclass(frozen=True, kw_only=True)
class AssessConfig:
    """Measure what each preset does for a checkpoint's classifier, and say whether to use one."""

    checkpoint: str = option("shipped name or folder", positional=True)
    data: Path = option("folder of class folders (of test images where it has test/), or .npz file")
    images: int = option("test images, random ones; 0 for all", 200)
    presets: tuple[str, ...] = option(
        f"{', '.join(PRESETS)}; may be repeated (default: those of at most {MOST_STEPS} steps)", ()
    )
    epsilon: float = option("radius of the attacks, L-infinity", 8 / 255)
    budget: Literal["fast", "standard"] = option(
        "of the attacks; fast: minutes on a CPU, but what is gained in the worst case is then only known from above",
        "fast",
    )
    seed: int = option("of the choice of images, and of the attacks", 0)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")
    out: Path = option("folder for the report, and for what has been computed", Path("assessment"))
    write_card: bool = option("put the figures and the verdict onto the checkpoint's card", False)
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if self.images < 0:
            raise ConfigError(f"images={self.images} is below 0")
        for name in self.presets:
            if name not in PRESETS:
                raise ConfigError(f"preset {name!r} is not one of {', '.join(PRESETS)}")


def assess(config: AssessConfig) -> int:
    """Measure, print a line for each preset and the verdict, and write the report with both at its top, and the figures
    as JSON.
    """
    if config.write_card and not Path(config.checkpoint).is_dir():
        raise ConfigError(f"write_card: {config.checkpoint} is no checkpoint's folder of your own")
    subject = store.load(config.checkpoint)
    wanted = config.presets or tuple(name for name, one in PRESETS.items() if one.loop.steps <= MOST_STEPS)
    absent = [name for name in wanted if name not in presets_of(subject.card)]
    headless = [name for name in absent if PRESETS[name].loop.steps]
    if absent and config.presets:
        without = lacking("head" if headless else "purifier", f"checkpoint {config.checkpoint!r}")
        raise ConfigError(f"preset {absent[0]!r}: {without}")
    specs = {name: f"reverse-attack:{name}" for name in wanted if name not in absent}
    data = load_images(
        "own",
        config.data,
        n=config.images or sys.maxsize,
        draw=config.seed,
        how=subject.card.pictures,
        classes=subject.card.classes,
        cache=config.cache,
    )
    report = evaluate(
        subject,
        data.images,
        data.labels,
        purifier=specs,
        epsilon=config.epsilon,
        attacks="fast",
        budget=config.budget,
        seed=config.seed,
        name=subject.card.id,
        dataset=config.data.stem,
        store=config.out,
        device=config.device,
        chunk=chunk_of(data.images),
    )
    judged = judged_presets(report.runs, subject.card, wanted)
    found = assessment(judged, subject.card, data=config.data.stem, seed=config.seed)
    shown = summary(judged, found, headless=headless)
    dataclasses.replace(report, summary=shown).save(config.out)
    made = {**as_json(config), "checkpoint": subject.card.id}
    write(config.out / "assessment.json", script=SCRIPT, config=made, results=found)
    for line in lines_of(shown):
        print(line)
    print(f"the whole report: {config.out / 'report.html'}")
    if config.write_card:
        card = dataclasses.replace(subject.card, figures={**subject.card.figures, "assessment": found})
        store.write_card(store.resolve(config.checkpoint), card)
    print(found["verdict"])
    return 0


def chunk_of(images: Tensor) -> int:
    """Return how many images [n, 3, h, w] are attacked at once."""
    return at_once(images, most=128, pixels=PIXELS_AT_ONCE)


def lines_of(shown: Summary) -> list[str]:
    """Return the summary's table and what stands below it, the names to the left, the rest to the right."""
    table = [shown.heads, *shown.rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])]).rstrip() for name, *texts in table]
    return [*lines, *shown.below]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(AssessConfig, assess, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
