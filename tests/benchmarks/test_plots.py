"""The report's plots: what is drawn of which run."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.records import averaged_record, in_order, record
from unperturb.benchmarks.reporting import plots
from unperturb.benchmarks.reporting.drawing import DARK, LIGHT, drawn_in, open_figure
from unperturb.benchmarks.reporting.plots import all_plots

N = 20
BARE = in_order({"clean": 4, "apgd-ce": 5, "autoattack": 1}, N)
KNOWN = in_order({"clean": 4, "transfer": 2, "intermediate": 8, "square": 0}, N)


def titles(*runs: dict[str, Any]) -> list[str]:
    return list(all_plots(list(runs)))


def test_stair_goes_down_by_each_attack_in_its_order_to_the_worst_case() -> None:
    with drawn_in(LIGHT):
        plt, figure, axes = open_figure(6, 4)
        plots._stair(axes, record(KNOWN, BARE), LIGHT)
        names = [text.get_text() for text in axes.get_yticklabels()]
        values = [list(patch.get_data().values) for patch in axes.patches]
        (bare,) = axes.lines
        written = [text.get_text() for text in axes.texts]
        plt.close(figure)
    assert names == ["clean", "transfer", "intermediate", "square", "worst case"]
    assert values[0] == values[1] == pytest.approx([80.0, 70.0, 30.0, 30.0, 30.0])
    assert list(bare.get_xdata()) == [50.0, 50.0]
    assert written == ["dashed: worst case of the bare classifier, 50.0", "80.0", "70.0", "30.0", "30.0"]


def test_stair_without_a_purifier_has_no_line_of_another_classifier() -> None:
    with drawn_in(LIGHT):
        plt, figure, axes = open_figure(6, 4)
        plots._stair(axes, record(BARE), LIGHT)
        lines = list(axes.lines)
        plt.close(figure)
    assert lines == []


def test_line_over_epsilon_is_of_runs_with_the_same_attacks_and_shows_their_worst_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[str, list[tuple[float, float]]]] = []

    def read(plt: Any, figure: Any) -> bytes:
        drawn.extend((line.get_label(), list(map(tuple, line.get_xydata()))) for line in figure.axes[0].lines)
        plt.close(figure)
        return b""

    monkeypatch.setattr(plots, "png", read)
    smaller = in_order({"clean": 4, "transfer": 1, "intermediate": 2, "square": 1}, N)
    fewer = in_order({"clean": 4, "transfer": 1}, N)
    runs = [record(KNOWN, BARE), record(smaller, BARE, epsilon=4 / 255), record(fewer, BARE, epsilon=2 / 255)]
    plots._by_epsilon(runs, LIGHT)
    ((name, points),) = drawn
    assert name == "tiny, reverse-attack: worst case over 3 attacks"
    assert [value for point in points for value in point] == pytest.approx([0, 80, 4, 60, 8, 30])
    assert plots._by_epsilon(runs[1:], LIGHT) is None


def test_plots_are_those_that_the_runs_have_enough_for() -> None:
    always = ["Robust accuracy by attack", "Accuracy left after each attack", "Worst case against time per image"]
    assert titles(record(BARE)) == always
    curves = "The purifier's objective over its steps"
    assert titles(record(BARE), record(KNOWN, BARE)) == [*always, curves]
    smaller = record(KNOWN, BARE, epsilon=4 / 255)
    assert titles(record(KNOWN, BARE), smaller) == [
        *always[:2],
        "Accuracy against perturbation size",
        always[2],
        curves,
    ]
    corrupted = {"clean": [1, 1], "fog-1": [1, 0]}
    assert titles(averaged_record(corrupted), averaged_record(corrupted, corrupted, threat="noise")) == []


def test_interval_that_rounding_put_above_its_value_is_drawn() -> None:
    run = record(BARE)
    run["results"]["figures"]["worst_case"] = {"accuracy": 0.0, "n": N, "interval": [2e-19, 0.1]}
    assert "Worst case against time per image" in titles(run)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_plot_lies_on_the_ground_of_its_theme(theme: Any) -> None:
    for png in all_plots([record(BARE), record(KNOWN, BARE)], theme).values():
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert "#{:02x}{:02x}{:02x}".format(*pixels[0, 0]) == theme.ground
        ink = np.array([int(theme.ink[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels.astype(int) - ink).max(-1) < 8).any()


def test_label_names_what_runs_differ_in() -> None:
    one, other = record(KNOWN, BARE), record(KNOWN, BARE, threat="L2", epsilon=0.5, model="large")
    assert plots.label(one, [one]) == "reverse-attack"
    assert plots.label(other, [one, other]) == "reverse-attack, large, L2 0.5"
    own = record(KNOWN, BARE, own=True)
    assert plots.label(own, [one, own]) == "reverse-attack, cifar10 (own)"
