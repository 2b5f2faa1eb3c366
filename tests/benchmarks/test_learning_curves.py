import json
from pathlib import Path

import pytest

from unperturb.benchmarks.reporting.learning_curves import learning_curves, rates_table, read_logs

pytest.importorskip("matplotlib")


def test_table_has_the_median_and_the_fastest_epoch_and_all_hours() -> None:
    epochs = [{"images_per_s": rate, "seconds": 1800.0} for rate in (20.0, 300.4, 90.0)]
    assert rates_table({"robust": epochs}).splitlines()[2] == "| `robust` | 3 | 90 | 300 | 1.5 |"


def test_every_run_has_a_panel_and_natural_training_one_curve(tmp_path: Path) -> None:
    epochs = [{"epoch": n, "held_out_clean_accuracy": 0.5 + n / 10, "held_out_pgd_accuracy": n / 10} for n in (1, 2, 3)]
    natural = [{"epoch": n, "held_out_clean_accuracy": 0.6} for n in (1, 2)]
    for name, run in (("robust", epochs), ("natural", natural)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in run))
    logs = read_logs(tmp_path)
    assert list(logs) == ["natural", "robust"]
    wide, narrow = learning_curves(logs), learning_curves({"robust": epochs})
    assert wide[:4] == narrow[:4] == b"\x89PNG"
    assert int.from_bytes(wide[16:20]) > 1.8 * int.from_bytes(narrow[16:20])
