"""Commands of the trainer on small data, and what they log."""

import json
from pathlib import Path
from typing import Any

from unperturb.training.log import LOG

FRESH = ["--arch", "wide_resnet_10_1", "--activation", "silu"]


def run_arguments(command: str, data: Path, out: Path, *more: str, **options: object) -> list[str]:
    """A training on the CPU: its folders, and its options by their names; True is a switch."""
    run = [command, "--data", str(data), "--out", str(out), "--cache", str(out.parent), "--device", "cpu"]
    for name, value in options.items():
        run += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [*run, *more]


def classifier_arguments(data: Path, out: Path, *more: str) -> list[str]:
    small = {"batch_size": 12, "held_out": 9, "lr": 0.05, "ema": 0.8, "attack_steps": 1, "attack_step_size": "10/255"}
    return run_arguments("classifier", data, out, *FRESH, *more, **small)


def pretrain_arguments(data: Path, out: Path, *more: str) -> list[str]:
    small = {"batch_size": 21, "held_out": 9, "hidden": 16, "embedding_dim": 8, "bank_size": 30}
    return run_arguments("pretrain", data, out, *more, **small, attack_steps=1, attack_step_size="8/255")


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def assert_lowered(out: Path, *figures: str) -> None:
    """Each of the figures is lower after the last epoch than after the first."""
    first, *_, last = read_log(out)
    for figure in figures:
        assert last[figure] < first[figure], figure
