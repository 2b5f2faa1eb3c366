"""Draw what one soft step gains and loses by how far it may reach."""

from fractions import Fraction
from typing import Any

from unperturb.benchmarks.reporting.drawing import LIGHT, open_figure, png

TITLE = "1 soft step of "
DRAWN = {"transfer": "attacker does not know of it", "worst": "attacker knows it, at most", "clean": "clean images"}


def reach_plot(record: dict[str, Any]) -> bytes:
    """Return the points gained over the bare classifier, with 95% intervals, against the step's reach; PNG."""
    rows = {0.0: record["results"]["rows"]["the vote alone"]}
    for title, row in record["results"]["rows"].items():
        if title.startswith(TITLE):
            rows[255 * float(Fraction(title.removeprefix(TITLE)))] = row
    plt, figure, axes = open_figure(8, 3.8)
    for number, (name, label) in enumerate(DRAWN.items()):
        gains = [row[name]["gain"] for row in rows.values()]
        means = [100 * gain["mean"] for gain in gains]
        spread = [[100 * abs(gain["interval"][end] - gain["mean"]) for gain in gains] for end in (0, 1)]
        places = [reach + 0.06 * (number - 1) for reach in rows]  # intervals beside one another
        colour = LIGHT.colours[number % len(LIGHT.colours)]
        axes.errorbar(places, means, spread, fmt="o-", capsize=3, color=colour, label=label)
    axes.axhline(0, color=LIGHT.ink, linewidth=0.8)
    axes.set_xlabel("reach of the step before the vote, in 1/255; 0: the vote alone")
    axes.set_ylabel("points over the bare classifier")
    axes.legend(frameon=False, fontsize=9)
    return png(plt, figure)
