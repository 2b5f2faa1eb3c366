"""Common corruptions and unbounded noise: what is drawn, and what the harness makes of it."""

from pathlib import Path

import pytest
import torch

from tests.conftest import make_checkpoint
from tests.support.harness import arguments, records
from unperturb.benchmarks import robustbench_eval
from unperturb.benchmarks.reporting import report
from unperturb.benchmarks.reporting.rows import load_runs
from unperturb.benchmarks.robustness import code, corruptions
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.plan import Plan
from unperturb.benchmarks.robustness.subjects import defense_of, ready
from unperturb.benchmarks.robustness.threat import Threat


def test_there_are_15_corruptions_of_5_severities() -> None:
    assert (len(set(corruptions.KINDS)), corruptions.SEVERITIES) == (15, (1, 2, 3, 4, 5))


def test_corruptions_are_generated_from_local_images_and_say_so(
    tiny_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    monkeypatch.setattr(corruptions, "KINDS", ("fog", "contrast"))
    monkeypatch.setattr(corruptions, "SEVERITIES", (1, 5))
    more = (
        "--threat-model",
        "corruptions",
        "--purifier",
        "none",
        "--purifier",
        "reverse-attack:steps=1",
        "--n-examples",
        "4",
        "--chunk",
        "2",
    )
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *more)) == 0
    planned = capsys.readouterr().out
    assert planned.count("5 kinds,        20 images") == 2  # of the bare classifier, and behind the purifier
    assert "to make the corrupted images takes its own time" in planned
    for record in records(tmp_path / "out").values():
        found = record["results"]
        assert found["corruptions"] == "generated"
        assert len(found["outcomes"]) == 1 + 2 * 2
        cells = [cell["alone"]["accuracy"] for cell in found["figures"]["attacks"].values()]
        assert found["figures"]["corruptions_mean"] == pytest.approx(sum(cells) / 4)
        assert (found["figures"]["gain"] is None) == (found["purifier_spec"] == "none")
    assert report.main([str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0
    assert "generated corruptions" in (tmp_path / "report" / "report.md").read_text()
    for shard in ("1/2", "2/2"):
        assert (
            robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "parts", *more, "--shard", shard))
            == 0
        )
    whole, parts = load_runs(tmp_path / "out"), load_runs(tmp_path / "parts")
    assert [run["results"]["figures"] for run in whole] == [run["results"]["figures"] for run in parts]


def test_unbounded_noise_is_measured_at_each_size_and_paired(
    tiny_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    more = ("--threat-model", "noise", "--purifier", "vote:shifts=1")
    assert robustbench_eval.main(arguments(tiny_folder, image_folder, tmp_path / "out", *more)) == 0
    ((_, record),) = records(tmp_path / "out").items()
    found = record["results"]
    assert list(found["outcomes"]) == ["clean", *(f"gaussian-{sigma}" for sigma in corruptions.SIGMAS)]
    means = [sum(row[1:]) / 5 for row in zip(*found["outcomes"].values(), strict=True)]
    bare = [sum(row[1:]) / 5 for row in zip(*found["bare_outcomes"].values(), strict=True)]
    assert found["figures"]["gain"]["mean"] == pytest.approx(sum(means) / 8 - sum(bare) / 8)


def test_noise_has_the_size_that_its_name_says(images: torch.Tensor) -> None:
    data = EvaluationSet(torch.full((4, 3, 32, 32), 0.5), torch.zeros(4, dtype=torch.long), "given", "grey")
    plan = Plan(threat=Threat(norm="linf", epsilon=8 / 255), budget=BUDGETS["fast"], attacks=())
    defended = defense_of("none", ready(make_checkpoint(), torch.device("cpu")))
    run = corruptions.NoiseRun(defended, data, plan, folder=Path())
    assert (run.corrupted("gaussian-16") - 0.5).std().item() == pytest.approx(16 / 255, rel=0.03)


def test_noise_that_other_code_of_the_generator_drew_is_not_taken_for_this_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = EvaluationSet(torch.full((4, 3, 32, 32), 0.5), torch.zeros(4, dtype=torch.long), "given", "grey")
    plan = Plan(threat=Threat(norm="linf", epsilon=8 / 255), budget=BUDGETS["fast"], attacks=())
    defended = defense_of("none", ready(make_checkpoint(), torch.device("cpu")))
    run = corruptions.NoiseRun(defended, data, plan, folder=tmp_path)

    def stored() -> int:
        run.measured()
        return len(list(tmp_path.rglob("*.npz")))

    kinds, source = len(run.kinds), code._source
    assert (stored(), stored()) == (kinds, kinds)
    monkeypatch.setattr(code, "_source", lambda name: b"other" if name.endswith(".philox") else source(name))
    assert stored() == 2 * kinds


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_generated_corruption_is_the_same_twice_and_no_copy(images: torch.Tensor, kind: str) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    pixels = (images[:2] * 255).round().byte()
    one, other = (corruptions.generate(pixels, kind, 5) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, pixels)
