"""`python benchmarks/reporting/learning_curves.py`: the shipped classifiers' learning curves, from their runs' logs.

A log is a run's log.jsonl, in benchmarks/results/training under the run's name; those of runs that went on from it
(`--resume-from`) follow in the same file, and a dotted line is where. Accuracies are of held-out training images, by
which the epoch was chosen.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from unperturb.benchmarks.reporting.drawing import LIGHT, drawn_in, open_figure, png
from unperturb.benchmarks.reporting.results import FOLDER, where
from unperturb.models import command
from unperturb.models.errors import DataError
from unperturb.models.files import write_whole

LOGS = FOLDER / "training"
PICTURE = "learning_curves.png"
SHOWN = {"held_out_clean_accuracy": "clean", "held_out_pgd_accuracy": "PGD-10"}


def read_logs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return every log's epochs by the run's name; raise DataError where there is none."""
    logs = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}
    if not logs:
        raise DataError(f"{folder} holds no log (*.jsonl) of a training run")
    return dict(sorted(logs.items()))


def learning_curves(logs: dict[str, list[dict[str, Any]]]) -> bytes:
    """Return the plot: a panel for each run, its accuracies in percent over the epochs."""
    with drawn_in(LIGHT):
        plt, figure, axes = open_figure(4.2 * len(logs), 3.6, rows=1, columns=len(logs))
        for panel, (name, epochs) in zip(axes.flat if len(logs) > 1 else [axes], logs.items(), strict=True):
            for colour, (key, label) in zip(LIGHT.colours, SHOWN.items(), strict=False):
                points = [(place, 100 * one[key]) for place, one in enumerate(epochs, 1) if key in one]
                if points:
                    panel.plot(*zip(*points, strict=True), color=colour, marker=".", label=label)
                    last = points[-1]
                    panel.annotate(f"{last[1]:.0f}%", last, xytext=(4, 4), textcoords="offset points", color=colour)
            for place, (before, after) in enumerate(pairwise(epochs), 1):
                if before.get("lr") == 0 and after.get("lr"):  # a run ends at a rate of 0
                    panel.axvline(place + 0.5, color=LIGHT.soft, linestyle=":")
            panel.set_title(name)
            panel.set_xlabel("epoch")
            panel.set_ylim(0, 100)
            panel.grid(axis="y")
            panel.legend(loc="lower right")
        (axes.flat[0] if len(logs) > 1 else axes).set_ylabel("held-out accuracy, %")
        return png(plt, figure)


def rates_table(logs: dict[str, list[dict[str, Any]]]) -> str:
    """Return how many images a second each run has trained on, the median and the most of its epochs, and its hours."""
    lines = [
        "| run | epochs | images/s, median epoch | images/s, fastest | hours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, epochs in logs.items():
        rates = [one["images_per_s"] for one in epochs]
        hours = sum(one["seconds"] for one in epochs) / 3600
        lines.append(f"| `{name}` | {len(epochs)} | {median(rates):.0f} | {max(rates):.0f} | {hours:.1f} |")
    return "\n".join(lines)


def trainer_table(record: dict[str, Any]) -> str:
    """Return what the trainer of two commits makes of the same training, a row an architecture."""
    found, commits = record["results"]["images_per_s"], record["results"]["commits"]
    lines = [
        f"| images/s, {where(record['machine'])} | {commits['before'][:7]} | {commits['after'][:7]} | times as many |",
        "| --- | ---: | ---: | ---: |",
    ]
    for arch, rates in found.items():
        ratios = [after / before for before, after in zip(rates["before"], rates["after"], strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| `{arch}` | {median(rates['before']):.0f} | {median(rates['after']):.0f} | {spread} |")
    return "\n".join(lines)


def main() -> int:
    """Draw the plot beside the logs; return the exit status of `models.command.run`."""

    def drawn() -> None:
        write_whole(LOGS / PICTURE, learning_curves(read_logs(LOGS)))
        print(LOGS / PICTURE)

    return command.run("learning_curves.py", drawn)


if __name__ == "__main__":
    sys.exit(main())
