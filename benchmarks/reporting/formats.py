"""The report's sections as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Sequence

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.rows import AVERAGED, FEW, Row, Signs
from unperturb.benchmarks.reporting.sections import Section, Summary, notes_of
from unperturb.benchmarks.robustness.figures import LARGER

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "∞": r"$_\infty$",
    c.DAGGER: r"$^\dagger$",
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "≤": r"$\le$",
    "≲": r"$\stackrel{<}{\sim}$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
}


def markdown_text(text: str) -> str:
    """Return text that stays within a cell of a Markdown table, and is no markup of HTML."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def markdown_table(columns: Sequence[c.Column], rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows."""
    lines = [
        [column.head for column in columns],
        ["---:" if column.number else "---" for column in columns],
        *([markdown_text(column.cell(row).whole) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_remarks(
    columns: Sequence[c.Column],
    rows: list[Row],
    say: Callable[[Row], list[str]] = c.cautions,
    name: Callable[[Row], str] = lambda row: f"`{row.purifier}`",
) -> str:
    """Return the table, and below it the legend of its marks and what is said of its rows, which it calls by `name`."""
    alike: dict[tuple[str, str], list[str]] = {}  # what is said of several rows stands once
    for row in rows:
        for text in say(row):
            alike.setdefault((c.threat_of(row.group), text), []).append(name(row))
    said = [f"- {', '.join(names)}, {threat}: {text}" for (threat, text), names in alike.items()]
    few = [c.LEGEND] if any(row.few for row in rows) else []
    below = [*few, *(["\n".join(map(markdown_text, said))] if said else [])]
    return "\n\n".join([markdown_table(columns, rows), *below])


def markdown(title: str, sections: Sequence[Section], summary: Summary | None = None) -> str:
    """Return the sections in Markdown: gains in words, the table with its remarks, all published rows folded away."""
    text = [f"# {title}"]
    if summary is not None:
        lines = [summary.heads, ("---", *["---:"] * (len(summary.heads) - 1)), *summary.rows]
        table = "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)
        text += [f"## {summary.title}", f"**{summary.verdict}**", table, *map(markdown_text, summary.below)]
    for section in sections:
        text.append(f"## {section.title}")
        if section.in_words:
            text.append("\n".join(f"- {markdown_text(said)}" for said in section.in_words))
        text.append(with_remarks(section.named, [*section.ours, *section.near], section.remarks, _named))
        if section.published:
            folded = f"<details><summary>All {len(section.published)} published rows</summary>"
            text += [folded, markdown_table(section.named, section.published), "</details>"]
    notes = [f"- **{name}**: {meaning}" for name, meaning in notes_of(sections).items()]
    return "\n\n".join([*text, "## How to read it", "\n".join(notes)]) + "\n"


def _named(row: Row) -> str:
    return f"`{row.purifier}` before `{row.model}`"


def latex_text(text: str) -> str:
    """Return text that LaTeX prints as it is; a sign before a number is a minus, not a hyphen."""
    escaped = "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))
    return c.with_minus(escaped, "$-$")


def latex(title: str, sections: Sequence[Section]) -> str:
    """Return the sections as floats with booktabs' rules."""
    tables = [latex_table(section, caption=f"{title}: {section.title}.") for section in sections]
    return "\n\n".join([r"% needs \usepackage{booktabs}", *tables]) + "\n"


def latex_table(section: Section, *, caption: str) -> str:
    """Return our rows and the near published ones; remarks on a row stand below, by the letter beside its name."""
    columns = [column for column in section.named if column not in (c.BUDGET, c.TIME)]
    budgets = ", ".join(dict.fromkeys(row.budget for row in section.ours if row.budget))
    caption += f" Budget of the attacks: {budgets}." if budgets else ""
    said = [latex_text(c.LEGEND)] if section.few else []
    lines, marked = [], 0
    for row in section.ours:
        cells = [latex_text(column.cell(row).whole) for column in columns]
        if spoken := section.remarks(row):
            mark, marked = rf"$^{{\mathrm{{{_letters(marked)}}}}}$", marked + 1
            said.append(f"{mark} {latex_text('; '.join(spoken))}")
            cells[0] += mark
        lines.append(cells)
    near = [[latex_text(column.cell(row).whole) for column in columns] for row in section.near]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{latex_text(caption)}}}",
            rf"\label{{tab:{_slug(section.title)}}}",
            rf"\begin{{tabular}}{{{''.join('r' if column.number else 'l' for column in columns)}}}",
            r"\toprule",
            _latex_line([latex_text(column.head) for column in columns]),
            r"\midrule",
            *map(_latex_line, lines),
            *([r"\midrule", *map(_latex_line, near)] if near else []),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip\footnotesize {note}" for note in said),
            r"\end{table*}",
        ]
    )


def _slug(title: str) -> str:
    """Return a title as a label: letters and digits, the rest hyphens."""
    return "-".join("".join(letter if letter.isalnum() and letter.isascii() else " " for letter in title).split())


def _latex_line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _letters(number: int) -> str:
    """Return a, b, … z, aa, ab, …"""
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("a") + last)


def csv_text(rows: Sequence[Row]) -> str:
    """Return a line a row: shares of 1 as numbers, the ends of intervals in columns of their own."""
    buffer = io.StringIO()
    lines = [_csv_line(row) for row in rows]
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _csv_line(row: Row) -> dict[str, str | float | int | None]:
    averaged = row.group.threat in AVERAGED

    def ends(name: str, interval: tuple[float, float] | None, *, at_most: bool = False) -> dict[str, float | None]:
        low, high = interval or (None, None)
        return {f"{name}_low": None if at_most else low, f"{name}_high": high}

    signs = row.signs or Signs(None, None, (), None, None, row.n)

    return {
        "dataset": row.group.dataset,
        "own_data": int(row.group.own),
        "threat": row.group.threat,
        "epsilon": None if averaged else row.group.epsilon,
        "model": row.model,
        "purifier": row.purifier,
        "source": row.source,
        "gain": row.gain,
        "gain_at_most": None if row.gain is None else int(row.gain_at_most),
        **ends("gain", row.gain_interval, at_most=row.gain_at_most),
        "n": row.n,
        f"fewer_than_{FEW}_images": c.DAGGER * row.few,
        "worst_case": None if averaged else row.worst,
        **ends("worst_case", row.interval),
        "mean_over_corruptions": row.worst if averaged else None,
        "clean": row.clean,
        "clean_gain": row.clean_gain,
        **ends("clean_gain", row.clean_gain_interval),
        "bare": row.bare,
        "transfer": row.transfer,
        "autoattack": row.static,
        "mean_of_draws": row.mean_of_draws,
        "worst_of_draws": row.worst_of_draws,
        "attacks": row.attacks or None,
        "budget": row.budget,
        "ms_per_image": row.ms_per_image,
        "apgd_ce": signs.once,
        "apgd_ce_twice": signs.twice,
        **{f"left_at_{times}_epsilon": dict(signs.larger).get(times) for times in LARGER},
        "transfer_beyond_gradient": signs.transfer,
        "queries_beyond_gradient": signs.queries,
        "warnings": "; ".join(row.warnings),
        "weaker": "; ".join(row.weaker),
        "notes": "; ".join(c.notes(row)),
        "could_not_run": "; ".join(f"{attack}: {reason}" for attack, reason in row.could_not_run),
        "remark": row.remark,
    }
