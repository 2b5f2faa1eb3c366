"""The report: its rows from records, each of its formats, and its command line."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.records import BARE, WORSE, N, averaged_record, in_order, record, write
from unperturb.benchmarks.reporting import columns, report, rows
from unperturb.benchmarks.reporting.columns import LEGEND
from unperturb.benchmarks.reporting.report import Report
from unperturb.benchmarks.reporting.results import accuracy, gain
from unperturb.benchmarks.reporting.rows import Group, load_runs, measured_row, published_rows
from unperturb.benchmarks.reporting.sections import tone
from unperturb.benchmarks.robustness.figures import LESS
from unperturb.models.errors import DataError

BETTER = in_order({"clean": 4, "apgd-ce": 0, "transfer": 0, "transfer-further": 0, "intermediate": 0}, N)  # 16 are left
SIGN = "twice the iterations break 6 images more & 5% | of <b>all</b>"
BROKEN = "transferred images break 3 of 20 that APGD's cross-entropy through the full gradient does not"
SIGNS = {
    "twice_the_iterations": {"once": accuracy([True] * 6 + [False] * 14), "twice": accuracy([False] * N)},
    "epsilon": [{"times": 2, "accuracy": accuracy([True] + [False] * 19)}],
    "transfer_beyond_gradient": {"broken": 3, "n": 20},
    "queries_beyond_gradient": None,
    "warnings": [SIGN],
}
CORRUPTED = {"clean": [1, 1, 1, 0], "gaussian_noise-1": [1, 1, 0, 0], "fog-5": [1, 0, 0, 0]}
CORRUPTED_BARE = {"clean": [1, 1, 1, 1], "gaussian_noise-1": [1, 1, 1, 1], "fog-5": [1, 1, 0, 1]}


def worse(**options: Any) -> dict[str, Any]:
    return record(WORSE, BARE, signs=SIGNS, could_not_run={"square": "no 8_bit & no images"}, **options)


@pytest.fixture(scope="module")
def made() -> Report:
    again = [[1] * 6 + [0] * 14, [1] * 4 + [0] * 16]
    return Report([worse(panel=2, resubmitted=again), record(BETTER, BARE, purifier="hedge"), record(BARE)])


@pytest.fixture(scope="module")
def page(made: Report) -> str:
    return made.to_html()


class Page(HTMLParser):
    """Rows of the figures' tables, the addresses that are asked for, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bodies: list[tuple[dict[str, str | None], list[str]]] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.addresses += [named[name] or "" for name in ("src", "srcset", "href") if name in named]
        if tag == "tbody":
            self.bodies.append((named, []))
        elif tag in ("td", "small") and self.bodies:
            self.bodies[-1][1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.bodies and self.bodies[-1][1]:
            self.bodies[-1][1][-1] += data.strip()

    def rows(self, kind: str) -> list[tuple[dict[str, str | None], list[str]]]:
        return [(named, cells) for named, cells in self.bodies if kind in (named.get("class") or "").split()]


def lines_of(text: str, start: str) -> list[list[str]]:
    """Cells of the Markdown rows that start so."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith(start)
    ]


def test_row_has_the_gain_before_all_and_every_figure_of_the_record() -> None:
    row = measured_row(worse(ms=3.5, resubmitted=[[1] * 6 + [0] * 14, [1] * 4 + [0] * 16]))
    paired = gain([False] * 16 + [True] * 4, [False] * 10 + [True] * 10)
    assert row.gain == pytest.approx(-0.3)
    assert row.gain_interval == tuple(paired["interval"])
    assert (row.worst, row.bare, row.clean, row.clean_gain, row.transfer) == (0.2, 0.5, 0.8, 0.0, 0.6)
    assert row.interval == tuple(accuracy([True] * 4 + [False] * 16)["interval"])
    assert (row.mean_of_draws, row.worst_of_draws) == (0.25, 0.2)
    assert (row.attacks, row.budget, row.n, row.ms_per_image, row.few) == (4, "fast", N, 3.5, True)
    assert row.warnings == (SIGN, BROKEN)  # what it says itself, and what its figures do
    assert row.could_not_run == (("square", "no 8_bit & no images"),)


def test_row_without_a_purifier_has_no_gain_and_no_transfer() -> None:
    row = measured_row(record(BARE))
    assert (row.gain, row.bare, row.transfer, row.worst, row.static) == (None, None, None, 0.5, 0.5)


def test_row_of_corruptions_has_the_mean_and_its_gain() -> None:
    row = measured_row(averaged_record(CORRUPTED, CORRUPTED_BARE))
    assert row.group == Group("cifar10", "corruptions", 0.0, generated=True)
    assert (row.worst, row.bare, row.clean, row.interval, row.attacks) == (0.375, 0.875, 0.75, None, 0)
    assert row.gain == pytest.approx(-0.5)
    (section,) = Report([averaged_record(CORRUPTED, CORRUPTED_BARE)]).sections
    assert (section.title, section.published) == ("cifar10, generated corruptions", [])
    assert published_rows(Group("cifar10", "corruptions", 0.0))


def test_rows_are_in_the_order_of_threats_and_purifiers() -> None:
    runs = [
        averaged_record(CORRUPTED, CORRUPTED_BARE),
        record(BETTER, BARE, purifier="anti-adversary"),
        record(BETTER, BARE, threat="L2", epsilon=0.5),
        record(BETTER, BARE, purifier="vote:views=8"),
        worse(),
        record(BARE),
    ]
    found = [(row.group.threat, row.purifier) for row in Report(runs).rows() if row.measured]
    linf = [("Linf", name) for name in ("none", "reverse-attack", "vote:views=8", "anti-adversary")]
    assert found == [*linf, ("L2", "reverse-attack"), ("corruptions", "reverse-attack")]


def test_own_data_stands_beside_no_published_rows_and_in_a_table_of_its_own() -> None:
    made = Report([worse(own=True), record(BARE)])
    sections = {section.title: section for section in made.sections}
    assert list(sections) == ["cifar10, L∞ 8/255", "cifar10 (own data), L∞ 8/255"]
    assert sections["cifar10, L∞ 8/255"].published
    assert sections["cifar10 (own data), L∞ 8/255"].published == []
    own = Report([worse(own=True)])
    assert all(row.measured for row in own.rows())
    assert ("leaderboard" in own.to_markdown(), "leaderboard" in made.to_markdown()) == (False, True)
    assert published_rows(Group("cifar10", "Linf", 8 / 255, own=True)) == []
    assert len(published_rows(("cifar10", "Linf", 8 / 255))) > 50


def test_published_rows_that_are_near_lie_around_the_bare_classifier(made: Report) -> None:
    (section,) = made.sections
    distances = sorted(abs((row.worst or 0) - 0.5) for row in section.published)
    assert sorted(abs((row.worst or 0) - 0.5) for row in section.near) == distances[:10]
    shares = [row.worst or 0 for row in section.near]
    assert shares == sorted(shares, reverse=True)
    (alone,) = Report([worse()]).sections  # without a run of none, the bare classifier of the purified run
    assert alone.near == section.near
    strong = in_order({"clean": 4, "apgd-ce": 2, "autoattack": 0}, N)  # 14 of 20 are left
    (both,) = Report([record(BARE), record(strong, model="strong")]).sections
    assert all(min(abs((row.worst or 0) - at) for at in (0.5, 0.7)) < 0.05 for row in both.near)
    assert {(row.worst or 0) > 0.6 for row in both.near} == {True, False}


def test_markdown_has_the_gain_first_and_marks_few_images(made: Report) -> None:
    text = made.to_markdown()
    heads = lines_of(text, "| model |")[0]
    assert heads[:6] == ["model", "purifier", "gain over bare, points (95%)", "n", "worst case, % (95%)", "clean, %"]
    (row,) = lines_of(text, "| tiny | reverse-attack |")
    assert row[2].startswith("-30.0 (-47.")
    assert row[3] == "20 †"
    assert row[4].startswith("20.0 (")
    assert row[5] == "80.0 (+0.0)"
    assert LEGEND in text
    assert {len(line) for line in lines_of(text.replace("\\|", ""), "| tiny |")} == {len(heads)}
    assert "reverse-attack before tiny makes things worse against an attacker who knows it: -30.0 points (-47" in text
    assert "hedge before tiny helps against an attacker who knows it: +30.0 points (+" in text
    assert "gradients may be masked: twice the iterations break 6 images more & 5% \\| of &lt;b>all&lt;/b>" in text
    assert "square could not be run: no 8_bit & no images" in text


def test_markdown_folds_the_other_published_rows_away(made: Report) -> None:
    shown, _, folded = made.to_markdown().partition("<details>")
    best = "| Bartoldson2024Adversarial_WRN-94-16 | none |"
    assert best not in shown
    assert best in folded
    assert shown.count("| published |") == 10
    assert f"All {folded.count('| published')} published rows" in folded


def test_many_images_are_not_marked() -> None:
    many = in_order({"clean": 100, "apgd-ce": 400, "autoattack": 0}, 1000)
    made = Report([record(many)])
    for text in (made.to_markdown(), made.to_latex(), made.to_csv().partition("\n")[2], Page(made.to_html()).text):
        assert "†" not in text
        assert "dagger" not in text
        assert LEGEND not in text


def test_latex_is_balanced_escaped_and_of_one_number_of_cells_a_table(made: Report) -> None:
    text = Report([*made.records, averaged_record(CORRUPTED, CORRUPTED_BARE)]).to_latex()
    bare = re.sub(r"\\[{}]", "", text)
    depth = 0
    for letter in bare:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0
    floats = re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(floats) == 3  # and one across threats
    for shape, body in floats:
        lines = [line for line in body.strip().splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(shape) - 1}
        assert [body.count(rule) for rule in (r"\toprule", r"\bottomrule")] == [1, 1]
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 3
    assert "$-$30.0 ($-$47." in text
    assert "L$_\\infty$ 8/255. Budget of the attacks: fast." in text
    assert r"\label{tab:cifar10-L-8-255}" in text
    assert r"20 $^\dagger$" in text
    assert r"$^\dagger$ fewer than 1,000 images" in text
    assert r"6 images more \& 5\% \textbar{} of \textless{}b\textgreater{}all" in text
    assert r"no 8\_bit \& no images" in text
    assert r"L$_\infty$ 8/255" in text
    assert not re.search(r"(?<!\\)[%#_](?!\\infty)", text.partition("\n")[2].replace("$_\\infty$", ""))


def test_csv_is_read_back_as_numbers(made: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert len(lines) == 3 + len(published_rows(("cifar10", "Linf", 8 / 255)))
    assert all(None not in line and None not in line.values() for line in lines)
    (line,) = (line for line in lines if line["purifier"] == "reverse-attack")
    row = measured_row(worse())
    assert row.gain_interval is not None
    assert (float(line["gain"]), float(line["gain_low"]), float(line["gain_high"])) == (row.gain, *row.gain_interval)
    assert float(line["gain"]) == pytest.approx(-0.3)
    assert (float(line["worst_case"]), float(line["bare"]), float(line["transfer"])) == (0.2, 0.5, 0.6)
    assert (line["n"], line["fewer_than_1000_images"], line["source"]) == ("20", "†", "measured")
    assert line["warnings"] == f"{SIGN}; {BROKEN}"
    assert line["could_not_run"] == "square: no 8_bit & no images"
    signs = ("apgd_ce", "apgd_ce_twice", "left_at_2_epsilon", "left_at_4_epsilon", "transfer_beyond_gradient")
    assert [line[name] for name in signs] == ["0.3", "0.0", "0.05", "", "3"]
    assert (line["gain_at_most"], line["weaker"]) == ("0", "")
    published = [line for line in lines if line["source"] == "published"]
    assert {line["fewer_than_1000_images"] for line in published} == {""}
    assert {line["gain"] for line in published} == {""}


def test_csv_of_a_gain_that_is_at_most_so_much_has_no_lower_end() -> None:
    run = worse()
    run["results"]["figures"]["weaker"] = ["too little"]
    (line, *_) = csv.DictReader(io.StringIO(Report([run]).to_csv()))
    assert (line["gain_at_most"], line["weaker"], line["gain_low"]) == ("1", "too little", "")
    assert float(line["gain_high"]) < 0


def test_gain_under_less_than_the_budget_standard_is_no_bound_and_no_verdict() -> None:
    run = worse()
    row = measured_row(run)
    assert (tone(row), tone(replace(row, weaker=("cut",)))) == ("worse", "worse")
    assert columns.GAIN.cell(replace(row, weaker=("cut",))).text.startswith("≤ -")
    less = replace(row, weaker=("cut", f"{LESS} (targets)"))
    assert tone(less) == "unjudged"
    assert columns.GAIN.cell(less).text.startswith("≲ -")
    assert f"{LESS} (targets): stronger ones may lower the gain" in columns.cautions(less)


def test_csv_of_corruptions_has_a_mean_and_no_worst_case() -> None:
    (line,) = (
        line
        for line in csv.DictReader(io.StringIO(Report([averaged_record(CORRUPTED, CORRUPTED_BARE)]).to_csv()))
        if line["source"] == "measured"
    )
    assert (line["worst_case"], line["mean_over_corruptions"], line["epsilon"]) == ("", "0.375", "")


def test_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[\w+/=]+", "", page))
    addresses = Page(page).addresses
    assert len(addresses) == 2 * 4 + 2 * 5  # a light and a dark file of every plot, five images for each of a panel
    assert all(address.startswith("data:image/png;base64,") for address in addresses)


def test_page_shows_the_nearest_published_rows_and_hides_the_others(page: str) -> None:
    published = Page(page).rows("published")
    hidden = [named for named, _ in published if "hidden" in named]
    assert len(published) - len(hidden) == 10
    assert len(published) == len(published_rows(("cifar10", "Linf", 8 / 255)))
    assert f">Show all {len(published)} published rows</button>" in page


def test_page_prints_gain_marks_and_remarks_in_the_row(page: str) -> None:
    parsed = Page(page)
    row = next(cells for _, cells in parsed.rows("measured") if cells[0] == "reverse-attack")
    assert row[2] == "\N{MINUS SIGN}30.0"
    assert "20 †" in row
    assert row[-1] == (
        "signs of masked gradients: APGD's cross-entropy leaves 30.0%, with twice the iterations 0.0%; "
        "of what all attacks left, 5.0% at 2 times ε; transferred images break 3 of 20 that it does not; "
        "not tested: queries"
        f"gradients may be masked: {SIGN}gradients may be masked: {BROKEN}square could not be run: no 8_bit & no images"
    )
    assert "<b>all" not in page
    assert LEGEND in parsed.text
    assert "makes things worse against an attacker who knows it" in parsed.text


def test_table_across_threats_has_each_purifier_that_met_several(made: Report) -> None:
    more = [record(BETTER, BARE, threat="L2", epsilon=0.5), averaged_record(CORRUPTED, CORRUPTED_BARE, threat="noise")]
    across = Report([*made.records, *more]).sections[-1]
    assert across.title == "Every threat"
    assert [(row.purifier, row.group.threat) for row in across.ours] == [
        ("reverse-attack", threat) for threat in ("Linf", "L2", "noise")
    ]
    assert not any(section.across for section in made.sections)


def test_report_is_saved_whole(made: Report, tmp_path: Path) -> None:
    written = made.save(tmp_path / "new" / "folder")
    names = {file.name for file in written}
    assert {"report.md", "report.html", "report.tex", "report.csv", "accuracy-left-after-each-attack.png"} <= names
    assert all(file.stat().st_size > 200 for file in written)
    text = (tmp_path / "new" / "folder" / "report.md").read_text()
    assert text.startswith(made.to_markdown())
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(linked) == {name for name in names if name.endswith(".png")}


def test_report_refuses_no_records_and_another_schema() -> None:
    with pytest.raises(DataError, match="at least one"):
        Report([])
    with pytest.raises(DataError, match="record 2 has schema 1, not 2; run it again"):
        Report([worse(), {**worse(), "schema_version": 1}])


def test_file_of_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, "old", {**worse(), "schema_version": 1})
    with pytest.raises(DataError, match=re.escape(f"{file} has schema 1, not 2; run it again")):
        load_runs(tmp_path)


def report_of(folder: Path, runs: Sequence[dict[str, Any]]) -> Path:
    for number, run in enumerate(runs):
        write(folder / "results", str(number), run)
    assert report.main([str(folder / "results"), "--out", str(folder / "report")]) == 0
    return folder / "report"


def test_command_line_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = report_of(tmp_path, [worse(), record(BARE)])
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(str(file) for file in folder.iterdir())
    assert (folder / "report.csv").read_text() == Report([worse(), record(BARE)]).to_csv()


def test_help_ends_well_and_an_unknown_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), ([str(tmp_path), "--surprise", "1"], 2)):
        with pytest.raises(SystemExit) as stopped:
            report.main(arguments)
        assert stopped.value.code == status
    said = capsys.readouterr()
    assert report.SCRIPT in said.out
    assert "surprise" in said.err


def test_folder_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{report.SCRIPT}: {tmp_path} holds no result of {rows.SCRIPT}\n"


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "run", worse())
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "report"
    assert report.main([str(tmp_path), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{report.SCRIPT}: {out}: Not a directory; a file stands where a folder is needed")


def test_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(folder: Path, out: Path) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)
    assert report.main(["nowhere"]) == 130
    assert "interrupted" in capsys.readouterr().err
