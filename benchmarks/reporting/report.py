"""`python benchmarks/reporting/report.py results/ --out report/`: a table, an HTML page and plots.

Made from the result files alone, beside RobustBench's published figures for the same data set and threat, which are
marked as published: no row claims a place on its leaderboard.
"""

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from unperturb.benchmarks.reporting.plots import all_plots
from unperturb.benchmarks.reporting.rows import (
    LEADERBOARD_SOURCE,
    Row,
    group_of,
    load_runs,
    measured_row,
    published_rows,
)
from unperturb.models.errors import UnperturbError
from unperturb.models.files import write_whole

SCRIPT = "benchmarks/reporting/report.py"
ASSETS = Path(__file__).resolve().parent / "assets"
HEADS = (
    "model",
    "purifier",
    "n",
    "budget",
    "clean",
    "static AA",
    "transfer",
    "worst case",
    "mean / worst of 10",
    "ms / image",
    "source",
)
NOTES = (
    "static AA: standard AutoAttack on the classifier without its purifier. transfer: those points through the "
    "purifier. worst case: an image counts as broken when any attack that was run broke it (95% Wilson interval); for "
    "published rows AutoAttack, or a lower published adaptive figure; for corruptions the mean over all of them. "
    "Without a purifier the worst case includes standard AutoAttack, whose steps and queries are many times those of "
    "the adaptive attacks at a small budget: a purifier's lead of a few points at `fast` may be that alone. mean / "
    "worst of 10: the hardest points of each image, sent again under ten fresh seeds. RobustBench takes no defense "
    "with an optimisation loop: no row claims a place there."
)


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    """Return a share in percent, with its interval."""
    if share is None:
        return ""
    return f"{share * 100:.1f}" + (f" ({interval[0] * 100:.1f} to {interval[1] * 100:.1f})" if interval else "")


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of HEADS."""
    worst = percent(row.worst, row.interval)
    if row.measured and row.attacks:
        worst += f", {row.attacks} attacks"
    source = ("measured" if row.measured else "published") + (f", {row.remark}" if row.remark else "")
    ms = "" if row.ms_per_image is None else f"{row.ms_per_image:.2f}"
    again = "" if row.worst_of_draws is None else f"{percent(row.mean_of_draws)} / {percent(row.worst_of_draws)}"
    return [
        row.model,
        row.purifier,
        f"{row.n:,}",
        row.budget,
        percent(row.clean),
        percent(row.static),
        percent(row.transfer),
        worst,
        again,
        ms,
        source,
    ]


def sort_keys(row: Row) -> list[float | str]:
    """Return the key that each cell of the page sorts by."""
    numbers = (row.clean, row.static, row.transfer, row.worst, row.worst_of_draws, row.ms_per_image)
    return [
        row.model,
        row.purifier,
        row.n,
        row.budget,
        *(-1.0 if value is None else value for value in numbers),
        "measured" if row.measured else "published",
    ]


def title_of(group: tuple[str, str, float]) -> str:
    """`cifar10, Linf, epsilon 8/255`."""
    dataset, threat, epsilon = group
    if threat == "corruptions":
        return f"{dataset}, common corruptions (worst case: the mean over corruptions)"
    return f"{dataset}, {threat}, epsilon " + (f"{epsilon * 255:.4g}/255" if threat == "Linf" else f"{epsilon:g}")


def tables(runs: list[dict[str, Any]]) -> dict[str, list[Row]]:
    """Return by title our rows, then the published ones."""
    found: dict[str, list[Row]] = {}
    for group in dict.fromkeys(group_of(run) for run in runs):
        ours = [measured_row(run) for run in runs if group_of(run) == group]
        found[title_of(group)] = ours + published_rows(group)
    return found


def markdown_table(rows: list[Row]) -> str:
    """Return a Markdown table of the rows."""
    lines = [HEADS, ["---"] * len(HEADS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: Path, out: Path) -> list[Path]:
    """Write all files of the report, and return them."""
    runs = load_runs(folder)
    plots = all_plots(runs)
    out.mkdir(parents=True, exist_ok=True)
    text = ["# Measured robustness", "", NOTES, f"Published rows: {LEADERBOARD_SOURCE}."]
    for title, rows in tables(runs).items():
        text += ["", f"## {title}", "", markdown_table(rows)]
    written = []
    for title, png in plots.items():
        file = out / f"{title.lower().replace(' ', '-').replace(chr(39), '')}.png"
        write_whole(file, png)
        text += ["", f"## {title}", "", f"![{title}]({file.name})"]
        written.append(file)
    write_whole(out / "report.md", ("\n".join(text) + "\n").encode())
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(
        heads=HEADS,
        notes=NOTES,
        source=LEADERBOARD_SOURCE,
        tables={
            title: [(cells(row), sort_keys(row), row.measured) for row in rows] for title, rows in tables(runs).items()
        },
        plots={title: base64.b64encode(png).decode() for title, png in plots.items()},
        panels=[run for run in runs if run["results"].get("panel")],
        runs=runs,
    )
    write_whole(out / "report.html", page.encode())
    return [*written, out / "report.md", out / "report.html"]


def main(arguments: list[str]) -> int:
    """Write the report, or say why not."""
    parser = argparse.ArgumentParser(prog=SCRIPT, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("results", type=Path, help="folder with result files, searched with its subfolders")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the report (default: report)")
    chosen = parser.parse_args(arguments)
    try:
        for file in write_report(chosen.results, chosen.out):
            print(file)
    except UnperturbError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # not writable, disk full
        where = f"{error.filename}: " if error.filename else ""
        print(f"{SCRIPT}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
