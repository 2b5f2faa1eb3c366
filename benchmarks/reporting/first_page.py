"""Make the first page's figures: the headline, the one table, and how often what the picture shows happens."""

from typing import Any

from unperturb.benchmarks.reporting.purifier_tables import points, share
from unperturb.benchmarks.reporting.results import gain


def headline(classifier: dict[str, Any], measured: dict[str, Any], run: dict[str, Any]) -> str:
    """Return what the preset `default` gains and costs: the one thing to know before one uses it.

    `run` has the full gradient through it; `classifier` is the run without a purifier, over the same images.
    """
    cells = measured["results"]["accuracy"]
    unknown, plain = cells["default"]["attacked"], cells["classifier"]["attacked"]
    if classifier["results"]["indices"] != run["results"]["indices"]:
        raise ValueError("the runs with and without a purifier are of other images")
    worst = [min(values) for values in zip(*classifier["results"]["outcomes"].values(), strict=True)]
    through = run["results"]["outcomes"]["unrolled"]
    known = gain([bool(v) for v in through], [bool(v) for v in worst])
    alone, behind = sum(worst) / len(worst), sum(through) / len(through)
    return (
        f"- The attacker **does not know** of the purifier (PGD-{measured['config']['steps']} on the classifier, "
        f"n = {unknown['n']:,}): {plain['accuracy']:.1%} of the images withstand without it, {unknown['accuracy']:.1%} "
        f"with it: **{points(unknown['gain'])} points**.\n"
        f"- The attacker **knows** it and follows its gradient (n = {known['n']}): {alone:.1%} withstand every attack, "
        f"AutoAttack among them, without it, {behind:.1%} the full gradient with it: **{points(known)} points**.\n"
        f"- On **clean** images (n = {unknown['n']:,}): {points(cells['default']['clean']['gain'])} points.\n\n"
        "In brackets: 95% intervals, paired by image."
    )


def main_table(measured: dict[str, Any], runs: list[dict[str, Any]], stronger: list[dict[str, Any]]) -> str:
    """Return the first page's table: the bare classifier and two presets, from the mildest attack to the worst."""
    accuracy = measured["results"]["accuracy"]
    attacks = {run["config"]["purifier"]: run["results"]["figures"] for run in [*runs, *stronger]}
    n, few = accuracy["classifier"]["clean"]["n"], attacks["none"]["worst_case"]["n"]
    rows = [
        f"| accuracy; L∞ {measured['config']['epsilon'] * 255:.0f}/255 | clean, n = {n:,} "
        f"| PGD-{measured['config']['steps']}, purifier unknown, n = {n:,} "
        f"| worst attack that we have, purifier known, n = {few} | ms per image |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, key, purifier in (
        ("no purifier", "classifier", "none"),
        ("preset `default`", "default", "reverse-attack"),
        ("preset `fast`", "fast", "reverse-attack:fast"),
    ):
        shown = [share(accuracy[key][points_of]) for points_of in ("clean", "attacked")]
        spent = measured["results"]["time"]["ms_per_image"][key]
        rows.append(f"| {name} | {' | '.join(shown)} | {share(attacks[purifier]['worst_case'])} | {spent:.1f} |")
    return "\n".join(rows)


def picture_line(record: dict[str, Any]) -> str:
    """Return what the picture shows, and how often that happens."""
    found, again = record["results"], record["results"]["changed_by_attack"]
    drawing = found["drawing"]
    return (
        f"Part of a drawing that comes with the service, **chosen** among {drawing['n']:,} parts: the attack changes "
        f"the label of {drawing['changed_by_attack']} of the {drawing['right']} that are called a ship, and the "
        f"purifier brings {drawing['brought_back']} back. On the first {found['n']:,} CIFAR-10 test images the "
        f"classifier has "
        f"{found['right']} right; the attack (PGD-20, L∞ 8/255, made without knowing of the purifier) changes {again} "
        f"of these labels, and the purifier brings {found['brought_back']} of them back, "
        f"{found['brought_back'] / again:.0%}; {found['spoiled']} that withstood the attack it spoils "
        f"(`{record['script']}`)."
    )
