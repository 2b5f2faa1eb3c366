"""`python benchmarks/reporting/tables.py`: the tables of the pages, from result files, card and settings."""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from unperturb.benchmarks.papers.table import systems_table
from unperturb.benchmarks.reporting.assessment import assessment, judged_presets
from unperturb.benchmarks.reporting.first_page import DEFAULT, headline, picture_line
from unperturb.benchmarks.reporting.learning_curves import LOGS, rates_table, read_logs, trainer_table
from unperturb.benchmarks.reporting.plots import all_plots
from unperturb.benchmarks.reporting.purifier_tables import (
    classifier_table,
    gates_table,
    purification_table,
    robustness_table,
    sweep_table,
    threats_table,
    time_table,
    worst_case_sweep_table,
)
from unperturb.benchmarks.reporting.reach_plot import reach_plot
from unperturb.benchmarks.reporting.results import FOLDER
from unperturb.benchmarks.reporting.rows import AVERAGED, group_of, load_runs, measured_row
from unperturb.benchmarks.reporting.service_tables import (
    bulk_line,
    dashboard_queries_table,
    faults_table,
    load_table,
    shares_table,
    side_by_side_table,
)
from unperturb.benchmarks.reporting.settings_table import settings_table
from unperturb.benchmarks.reporting.speed_tables import http_table, speed_table
from unperturb.benchmarks.reporting.when import when_table
from unperturb.models import command
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.files import write_whole
from unperturb.models.purifiers.defended import presets_of

SINGLE = {
    **{f"worst_case_sweep_{sweep}": worst_case_sweep_table for sweep in ("views", "reach", "steps", "transfer")},
    "load": load_table,
    "serving/shares": shares_table,
    "side_by_side": side_by_side_table,
    "faults": faults_table,
    "bulk_memory": bulk_line,
    "training_speed": trainer_table,
    "serving/dashboard_queries": dashboard_queries_table,
}
ROBUSTNESS, SURROGATE = FOLDER / "robustness", FOLDER / "surrogate"
REACH = Path("worst_case_sweep_reach.json")
EPSILON = 8 / 255  # of the page's main table
PLOTS = {"Accuracy left after each attack": "every-attack.png"}
ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """Return every page of the documentation: those at the top level, and the site's."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def records_in(folder: str) -> dict[Path, dict[str, Any]]:
    """The results in a folder, by file."""
    return {file: json.loads(file.read_text()) for file in sorted((FOLDER / folder).glob("*.json"))}


def robustness_runs(purifier: str = DEFAULT) -> list[dict[str, Any]]:
    """Return the runs under every threat of the first shipped checkpoint before which a purifier was judged."""
    runs = load_runs(ROBUSTNESS)
    for name in store.shipped_names():
        own = [run for run in runs if run["results"]["model"]["spec"] == store.read_card(store.resolve(name)).id]
        if any(run["results"]["purifier_spec"].partition(":")[0] == purifier for run in in_main_ball(own)):
            return own
    return []


def _averaged_elsewhere(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs under corruptions and noise before other classifiers than that of `runs`."""
    own = {run["results"]["model"]["spec"] for run in runs}
    others = [run for run in load_runs(ROBUSTNESS) if run["results"]["model"]["spec"] not in own]
    return [run for run in others if group_of(run).threat in AVERAGED]


def autoattacked() -> dict[str, dict[str, Any]]:
    """Return what AutoAttack leaves of each classifier without a purifier, in the main ball, by the card's id."""
    bare = [run["results"] for run in in_main_ball(load_runs(ROBUSTNESS)) if not run["results"]["purifies"]]
    return {found["model"]["spec"]: found["figures"]["attacks"]["autoattack"]["alone"] for found in bare}


def assess_shipped() -> dict[str, dict[str, Any]]:
    """Return by name the `assessment` of shipped checkpoints before which a preset was judged in the main ball, and not
    by few images.
    """
    runs, found = in_main_ball(load_runs(ROBUSTNESS)), {}
    for name in store.shipped_names():
        card = store.read_card(store.resolve(name))
        own = [run for run in runs if run["results"]["model"]["spec"] == card.id and not measured_row(run).few]
        judged = judged_presets(own, card, presets_of(card))
        if any(one.row.gain is not None for one in judged):
            config = own[0]["config"]
            found[name] = assessment(judged, card, data=config["dataset"], seed=config["seed"])
    return found


def in_main_ball(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs in the L∞ ball that the classifier was trained for."""
    return [run for run in runs if group_of(run).threat == "Linf" and abs(group_of(run).epsilon - EPSILON) < 1e-9]


def all_tables() -> dict[str, str]:
    """Return every table by name, made from the result files, the shipped card and the service's settings."""
    measured = list(records_in("purification").values())
    swept = json.loads((FOLDER / "preset_sweep.json").read_text())
    everything, runs, frozen = load_runs(ROBUSTNESS), robustness_runs(), robustness_runs("restorer")
    main_runs, judged = in_main_ball(runs), in_main_ball(everything)
    served = store.read_card(store.resolve(store.shipped_names()[0])).id
    tables = {
        "settings": settings_table(),
        "headline": headline(main_runs),
        "when": when_table(judged, everything, load_runs(SURROGATE), measured, served=served),
        "picture": picture_line(json.loads((FOLDER / "brought_back.json").read_text())),
        "classifier": classifier_table(autoattacked()),
        "gates": gates_table(),
        "purification": "\n\n".join(map(purification_table, measured)),
        "time": "\n\n".join(map(time_table, measured)),
        "sweep": sweep_table(swept),
        "sweep_restored": sweep_table(json.loads((FOLDER / "preset_sweep_restored.json").read_text())),
        "robustness": robustness_table(main_runs),
        "robustness_served": robustness_table([run for run in judged if run["results"]["model"]["spec"] == served]),
        "threats": threats_table([*runs, *_averaged_elsewhere(runs)]),
        **({"frozen": robustness_table(in_main_ball(frozen))} if frozen else {}),
        "systems": systems_table(FOLDER / "systems" / "small"),
        "training_rates": rates_table(read_logs(LOGS)),
    }
    for name, make in SINGLE.items():
        if (file := FOLDER / f"{name}.json").exists():
            tables[file.stem] = make(json.loads(file.read_text()))
    if records := records_in("purify_speed"):
        tables["speed"] = "\n\n".join(map(speed_table, records.values()))
    if records := records_in("http_cost"):
        tables["http_cost"] = http_table(list(records.values()))
    return tables


def places(text: str) -> list[str]:
    """Return the names of the tables that a page has places for."""
    return re.findall(r"<!-- table: (\w+) -->", text)


def render(text: str, tables: dict[str, str]) -> str:
    """Return a page with every table made anew; SystemExit for a place that has no result."""
    for name in places(text):
        if name not in tables:
            raise SystemExit(f"there is a place for the table {name!r}, and no result for it")
        before, start, rest = text.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (start and end):
            raise SystemExit(f"the place for the table {name!r} has no end")
        text = f"{before}{start}{tables[name]}\n{end}{after}"
    return text


def write_tables() -> None:
    """Write the tables into their pages, the plots beside their results, and onto the shipped cards what was judged.

    ConfigError for a table without a page.
    """
    tables = all_tables()
    texts = {page: page.read_text() for page in pages()}
    if homeless := set(tables).difference(*map(places, texts.values())):
        raise ConfigError(f"no page has a place for {', '.join(sorted(homeless))}")
    for page, text in texts.items():
        write_whole(page, render(text, tables).encode())
    for name, found in assess_shipped().items():
        card = store.read_card(store.resolve(name))
        store.write_card(store.resolve(name), replace(card, figures={**card.figures, "assessment": found}))
    for title, png in all_plots(in_main_ball(robustness_runs())).items():
        if title in PLOTS:
            write_whole(FOLDER / PLOTS[title], png)
    write_whole(FOLDER / REACH.with_suffix(".png"), reach_plot(json.loads((FOLDER / REACH).read_text())))
    print(f"wrote {len(tables)} tables into {len(texts)} pages", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status of `models.command.run`."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    return command.run("tables.py", write_tables)


if __name__ == "__main__":
    sys.exit(main())
