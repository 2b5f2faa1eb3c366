import json
import subprocess
from pathlib import Path

import pytest

from unperturb.benchmarks import training_speed
from unperturb.benchmarks.reporting.learning_curves import trainer_table
from unperturb.models.errors import ConfigError

ROOT = Path(training_speed.__file__).resolve().parents[1]
needs_history = pytest.mark.skipif(
    subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode != 0,
    reason="no history here",
)


@needs_history
def test_both_commits_train_and_their_rates_stand_in_the_table(image_folder: Path, tmp_path: Path) -> None:
    config = training_speed.TrainingSpeedConfig(
        data=str(image_folder),
        before="HEAD",
        arch=("wide_resnet_10_1",),
        images=16,
        held_out=8,
        batch_size=8,
        epochs=1,
        rounds=1,
        device="cpu",
        out=tmp_path / "speed.json",
    )
    training_speed.measure(config)
    record = json.loads(config.out.read_text())
    assert record["config"]["data"] == image_folder.name
    assert record["results"]["commits"]["before"] == record["results"]["commits"]["after"]
    (rates,) = record["results"]["images_per_s"].values()
    assert all(len(found) == 1 and found[0] > 0 for found in rates.values())
    assert trainer_table(record).splitlines()[2].startswith("| `wide_resnet_10_1` | ")


@needs_history
def test_what_is_no_commit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such is no commit"):
        training_speed.checkout("no-such", tmp_path)


@needs_history
def test_training_that_fails_says_why(image_folder: Path, tmp_path: Path) -> None:
    config = training_speed.TrainingSpeedConfig(data=str(image_folder), before="HEAD", device="cpu")
    with pytest.raises(ConfigError, match="no-such-network"):
        training_speed.images_per_s(ROOT, config, "no-such-network", tmp_path / "run")


def test_rows_have_the_rounds_own_ratios() -> None:
    rates = {"before": [10.0, 20.0, 30.0], "after": [20.0, 30.0, 90.0]}
    record = {
        "machine": {"device": "cpu", "name": "x86_64", "cpu_threads": 2},
        "results": {"commits": {"before": "a" * 40, "after": "b" * 40}, "images_per_s": {"net": rates}},
    }
    assert trainer_table(record).splitlines()[2] == "| `net` | 20 | 30 | 2.00 (1.50 to 3.00) |"
