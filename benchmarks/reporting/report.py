"""`python benchmarks/reporting/report.py results/ --out report/`: tables as Markdown, LaTeX and CSV, a page, and plots.

Made from the result files alone, beside RobustBench's published figures for the same data set and threat, which are
marked as published: no row claims a place on its leaderboard.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unperturb.benchmarks.reporting import formats
from unperturb.benchmarks.reporting.drawing import DARK
from unperturb.benchmarks.reporting.page import page
from unperturb.benchmarks.reporting.plots import all_plots
from unperturb.benchmarks.reporting.rows import Row, check_schema, load_runs, measured_row, ordered
from unperturb.benchmarks.reporting.sections import Section, Summary, sections
from unperturb.models import command
from unperturb.models.errors import DataError
from unperturb.models.files import write_whole

SCRIPT = "benchmarks/reporting/report.py"
TITLE = "Measured robustness"


@dataclass(frozen=True)
class Report:
    """What can be made of the result records of whole runs; raises DataError for no record or one of another schema.

    summary: what stands at the top of page and Markdown
    """

    records: list[dict[str, Any]]
    summary: Summary | None = None

    def __post_init__(self) -> None:
        """Check the records."""
        if not self.records:
            raise DataError("a report is made of at least one result record")
        for number, record in enumerate(self.records, 1):
            check_schema(record, f"record {number}")

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """Return the records in the order of the tables."""
        return ordered(self.records)

    @cached_property
    def sections(self) -> list[Section]:
        """Return the tables: one for each data set and threat, and one across threats where there are several."""
        return sections([measured_row(run) for run in self.runs])

    @cached_property
    def plots(self) -> dict[str, bytes]:
        """Return the plots as PNG files, by title."""
        return all_plots(self.runs)

    def rows(self) -> list[Row]:
        """Return every row once: for each data set and threat the measured ones, then the published ones."""
        groups = [section for section in self.sections if not section.across]
        return [row for section in groups for row in (*section.ours, *section.published)]

    def to_markdown(self) -> str:
        """Return the tables in Markdown, with their gains in words; plots are files, and not in it."""
        return formats.markdown(TITLE, self.sections, self.summary)

    def to_latex(self) -> str:
        """Return the tables with booktabs' rules; of the published rows the nearest."""
        return formats.latex(TITLE, self.sections)

    def to_csv(self) -> str:
        """Return a line a row; numbers as numbers, shares of 1."""
        return formats.csv_text(self.rows())

    def to_html(self) -> str:
        """Return one page of everything, plots and images within it."""
        dark = all_plots(self.runs, DARK)
        plots = {title: (light, dark[title]) for title, light in self.plots.items()}
        return page(TITLE, self.sections, plots=plots, runs=self.runs, summary=self.summary)

    def save(self, folder: Path | str) -> list[Path]:
        """Write report.md, report.tex, report.csv, report.html and the plots into a folder; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {f"{title.lower().replace(' ', '-').replace(chr(39), '')}.png": title for title in self.plots}
        plots = "".join(f"\n## {title}\n\n![{title}]({file})\n" for file, title in files.items())
        written = {
            **{file: self.plots[title] for file, title in files.items()},
            "report.md": (self.to_markdown() + plots).encode(),
            "report.tex": self.to_latex().encode(),
            "report.csv": self.to_csv().encode(),
            "report.html": self.to_html().encode(),
        }
        for name, payload in written.items():
            write_whole(folder / name, payload)
        return [folder / name for name in written]


def write_report(folder: Path, out: Path) -> list[Path]:
    """Write the report of a folder's result files; return its files."""
    return Report(load_runs(folder)).save(out)


def main(arguments: list[str]) -> int:
    """Write the report, or say why not."""
    parser = argparse.ArgumentParser(prog=SCRIPT, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("results", type=Path, help="folder with result files, searched with its subfolders")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the report (default: report)")
    chosen = parser.parse_args(arguments)

    def written() -> None:
        for file in write_report(chosen.results, chosen.out):
            print(file)

    return command.run(SCRIPT, written)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
