"""Make the first page's figures: the headline, and how often what the picture shows happens."""

from collections.abc import Sequence
from typing import Any

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.results import gain
from unperturb.benchmarks.reporting.rows import Row, measured_row
from unperturb.benchmarks.reporting.sections import tone
from unperturb.benchmarks.robustness.attacks import AUTOATTACK
from unperturb.benchmarks.robustness.figures import survivors, withstands_unknowing
from unperturb.models.checkpoints import store

DEFAULT, VOTE = "reverse-attack", "vote"
VERDICTS = {
    "worse": "it **makes things worse** against an attacker who knows it",
    "better": "it helps, also against an attacker who knows it",
    "even": "no difference can be told",
    "unjudged": "it was attacked with less than a judge needs, so that it may be less",
}


def by_purifier(runs: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], Row]]:
    """Return runs and rows by purifier; ValueError for two of one purifier, and where the default one is missing."""
    found: dict[str, tuple[dict[str, Any], Row]] = {}
    for run in runs:
        row = measured_row(run)
        if row.purifier in found:
            raise ValueError(f"there are two runs of {row.purifier!r}")
        found[row.purifier] = (run, row)
    if DEFAULT not in found:
        raise ValueError(f"there is no run of {DEFAULT!r}")
    return found


def is_vote(purifier: str) -> bool:
    """Return whether it is the vote alone, whatever its parameters."""
    return purifier.partition(":")[0] == VOTE


def headline(runs: list[dict[str, Any]]) -> str:
    """Return what the preset `default` gains and costs: the one thing to know before one uses it.

    `runs` are of one classifier, data set and threat.
    """
    found = by_purifier(runs)
    run, row = found[DEFAULT]
    known = c.GAIN.cell(row).whole
    lines = [
        f"- Preset `default`, the attacker **knows** it (the worst of {row.attacks} attacks, budget `{row.budget}`): "
        f"**{known} points**, n = {c.COUNT.cell(row).text}; {VERDICTS[tone(row)]}. "
        f"{c.percent(row.bare).text}% of the images withstand without it, {c.percent(row.worst).text}% with it."
    ]
    for vote_run, vote in (pair for name, pair in found.items() if is_vote(name)):
        gained = c.GAIN.cell(vote).whole
        lines.append(
            f"- The vote alone (`{vote.purifier}`), likewise (the worst of {vote.attacks}): **{gained} points**, "
            f"n = {c.COUNT.cell(vote).text}; {VERDICTS[tone(vote)]}." + _beside_the_vote(run, vote_run, row.weaker)
        )
    if transferred := transfer_gain(run):
        lines.append(
            "- Preset `default`, the attacker **does not know** it (AutoAttack's images of the bare classifier, and "
            f"the same moved on to where that is wrong by most): **{c.paired(transferred).whole} points**, "
            f"n = {c.COUNT.cell(row).text}."
        )
    clean = c.points(row.clean_gain, row.clean_gain_interval).whole
    lines.append(f"- Preset `default` on **clean** images: {clean} points, n = {c.COUNT.cell(row).text}.")
    below = (
        f"Points are those over the bare classifier on the same images, here `{row.model}`, the smallest that ships; "
        "in brackets: 95% intervals."
    )
    if row.few:
        below += f" {c.LEGEND}"
    return "\n".join([*lines, "", below])


def _beside_the_vote(run: dict[str, Any], vote_run: dict[str, Any], weaker: Sequence[str]) -> str:
    """Return what the preset `default` gains over the vote alone, in a sentence; "" where their images differ.

    weaker: why the attacks on `default` are less than a judge's
    """
    found, other = run["results"], vote_run["results"]
    if found["indices"] != other["indices"]:
        return ""
    knows = gain(survivors(found["outcomes"]), survivors(other["outcomes"]))
    shown = c.paired(knows, weaker).whole
    said = f" Over the vote `default` gains {shown} points against who knows it"
    after, of_vote = withstands_unknowing(found["outcomes"]), withstands_unknowing(other["outcomes"])
    if after is None or of_vote is None:
        return f"{said}."
    return f"{said}, and {c.paired(gain(after, of_vote)).whole} against who does not."


def transfer_gain(run: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the purifier gains on images attacked without knowing of it, paired; None where not measured."""
    found = run["results"]
    after, bare = withstands_unknowing(found["outcomes"]), found["bare_outcomes"]
    if after is None or AUTOATTACK not in bare:
        return None
    return gain(after, [bool(value) for value in bare[AUTOATTACK]])


def picture_line(record: dict[str, Any]) -> str:
    """Return what the picture shows, and how often that happens."""
    found, again = record["results"], record["results"]["changed_by_attack"]
    drawing, checkpoint = found["drawing"], record["config"]["checkpoint"]
    model = store.read_card(store.resolve(checkpoint)).id
    return (
        f"Part of a drawing that comes with the service, **chosen** among {drawing['n']:,} parts: the attack changes "
        f"the label of {drawing['changed_by_attack']} of the {drawing['right']} that are called a ship, and the preset "
        f"`{found['preset']}`, which is for attackers who do not know of it, brings {drawing['brought_back']} back. On "
        f"the first {found['n']:,} CIFAR-10 test images `{model}` has {found['right']} right; the attack "
        "(PGD-20 alone, L∞ 8/255, made without knowing of the purifier; AutoAttack's images were not tried) changes "
        f"{again} of these labels, and `{found['preset']}` brings {found['brought_back']} of them back, "
        f"{found['brought_back'] / again:.0%}; of those that withstand it `{found['preset']}` spoils "
        f"{found['spoiled']}, and of the right ones that nobody attacked {found['spoiled_clean']} "
        f"(`{record['script']}`)."
    )
