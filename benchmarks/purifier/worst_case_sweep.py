"""`python benchmarks/purifier/worst_case_sweep.py --data DIR`: candidates for the presets, judged by their worst case.

On held-out training images, so that the test images stay untouched until a preset is chosen: what each candidate gains
over the bare classifier on clean images, on images attacked without knowing of it (transfer), and in the worst case
over APGD's cross-entropy and targeted losses through the whole defense, its full gradient, and transfer.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unperturb.benchmarks.command import BenchmarkConfig, run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.reporting.first_page import transfer_gain
from unperturb.benchmarks.reporting.results import accuracy
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.evaluate import evaluate
from unperturb.benchmarks.robustness.figures import withstands_unknowing
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.training import data, held_out

SCRIPT = "benchmarks/purifier/worst_case_sweep.py"
UNKNOWN = "autoattack,transfer"  # the bare classifier's adversarial images alone
KNOWN = "autoattack,apgd-ce,apgd-t,transfer"

VIEWS = {
    "image and mirror image": "vote:shifts=0",
    "image and one shift, not mirrored": "vote:shifts=0/0+2/2,mirrored=no",
    "two shifts by 2, not mirrored": "vote:shifts=2,mirrored=no",
    "image and one shift, mirrored": "vote:shifts=0/0+2/2",
    "two shifts by 1, mirrored": "vote:shifts=1",
    "two shifts by 2, mirrored": "vote:shifts=2",
    "two shifts by 3, mirrored": "vote:shifts=3",
    "two shifts by 4, mirrored": "vote:shifts=4",
    "image and two shifts by 2, mirrored": "vote:shifts=0/0+-2/-2+2/2",
    "four shifts by 2, mirrored": "vote:shifts=-2/-2+-2/2+2/-2+2/2",
    "image and four shifts by 2, mirrored": "vote:shifts=0/0+-2/-2+-2/2+2/-2+2/2",
}


def _step(step_size: str, *, steps: int = 1, kind: str = "soft", vote: str = "2") -> str:
    """Return the specification of reverse steps before a vote."""
    return f"reverse-attack:transfer,step={kind},steps={steps},step_size={step_size},vote={vote}"


REACH = {
    "the vote alone": "vote",
    **{f"1 soft step of {size}": _step(size) for size in ("1/510", "1/255", "2/255", "4/255", "8/255")},
}
STEPS = {
    "the vote alone": "vote",
    "1 soft step of 2/255": _step("2/255"),
    "2 soft steps of 1/255": _step("1/255", steps=2),
    "5 soft steps of 2/1275": _step("2/1275", steps=5),
    "1 sign step of 2/255": _step("2/255", kind="sign"),
    "1 soft step of 2/255, no vote": _step("2/255", vote="none"),
}
TRANSFER = {
    "the vote alone": "vote",
    "5 sign steps of 2/255": _step("2/255", steps=5, kind="sign", vote="none"),
    "5 sign steps of 2/255, vote": _step("2/255", steps=5, kind="sign"),
    "1 sign step of 6/255": _step("6/255", kind="sign", vote="none"),
    "1 sign step of 6/255, vote": _step("6/255", kind="sign"),
    "1 sign step of 8/255, vote": _step("8/255", kind="sign"),
    "2 sign steps of 4/255, vote": _step("4/255", steps=2, kind="sign"),
    "5 soft steps of 4/255, vote": _step("4/255", steps=5),
    "the restorer alone": "restorer",
    "the restorer, vote": "restorer:vote=2",
}
SWEEPS = {"views": VIEWS, "reach": REACH, "steps": STEPS, "transfer": TRANSFER}


@dataclass(frozen=True, kw_only=True)
class WorstCaseConfig(BenchmarkConfig):
    """Sweep the vote's views, or the reach or kind of steps before it, on held-out images; `transfer` stops there."""

    data: str = option("the data set that the checkpoint was trained on")
    sweep: Literal["views", "reach", "steps", "transfer"] = option("which candidates", "views")
    n: int = option("held-out training images", 500)
    epsilon: float = option("attack radius, L-infinity", 8 / 255)
    iterations: int = option("of every APGD, on the bare classifier and through the candidates", 30)
    targets: int = option("of the targeted APGD through a candidate; the bare classifier has 9", 3)
    out: Path | None = option("result file (default: results/worst_case_sweep_<sweep>.json)", None)
    store: Path = option("folder for what has been computed", Path("worst-case-sweep"))
    cache: Path | None = option("folder for decoded images (default ~/.cache/unperturb)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for counts below 1."""
        for name in ("n", "iterations", "targets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


def sweep(config: WorstCaseConfig) -> int:
    """Sweep, write the result file, and say the figures."""
    loaded = store.load(config.checkpoint)
    dataset = data.load_for(loaded.card, config.data, cache=config.cache)
    held = held_out.kept_back(dataset, loaded.card)
    candidates = SWEEPS[config.sweep]
    budget = dataclasses.replace(
        BUDGETS["standard"],
        apgd_steps=config.iterations,
        targets=config.targets,
        autoattack_steps=config.iterations,
        autoattack_queries=100,
    )
    report = evaluate(
        loaded,
        held.images[: config.n].float() / 255,
        held.labels[: config.n],
        purifier=candidates,
        epsilon=config.epsilon,
        attacks=UNKNOWN if config.sweep == "transfer" else KNOWN,
        budget=budget,
        seed=config.seed,
        name=loaded.card.id,
        dataset=dataset.name,
        store=config.store,
        device=config.device,
    )
    found = {run["results"]["purifier_spec"]: row_of(run) for run in report.runs}
    rows = {title: found[title] for title in ("none", *candidates)}
    for title, row in rows.items():
        gains = "  ".join(
            f"{name} {row[name]['gain']['mean']:+.1%}" for name in ("clean", "transfer", "worst") if "gain" in row[name]
        )
        print(f"{title:38} {gains or 'worst case ' + format(row['worst']['accuracy'], '.1%')}")
    specs = {title: candidates.get(title, title) for title in rows}
    record = {
        "checkpoint": {"id": loaded.card.id, "weights_sha256": loaded.card.weights_sha256},
        "rows": {title: {"purifier": specs[title], **row} for title, row in rows.items()},
    }
    out = config.out or results.FOLDER / f"worst_case_sweep_{config.sweep}.json"
    results.write(out, script=SCRIPT, config=as_json(config), results=record)
    return 0


def row_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's accuracies, each with what it gains over the bare classifier on the same images."""
    found = run["results"]
    figures, withstanding = found["figures"], withstands_unknowing(found["outcomes"])
    row: dict[str, Any] = {
        "clean": dict(figures["clean"]),
        "worst": {**figures["worst_case"], "weaker": figures["weaker"]},
        "transfer": {} if withstanding is None else accuracy(withstanding),
        "ms_per_image": found["timings"]["ms_per_image"]["defended"],
    }
    gains = {"clean": figures["clean_gain"], "worst": figures["gain"]}
    if figures["gain"] is not None:
        gains["transfer"] = transfer_gain(run)
    for name, gain in gains.items():
        if gain is not None:
            row[name]["gain"] = gain
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(WorstCaseConfig, sweep, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
