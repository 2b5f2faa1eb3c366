"""The report as one HTML page that asks for nothing from elsewhere."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from unperturb.benchmarks.reporting import columns as c
from unperturb.benchmarks.reporting.results import where
from unperturb.benchmarks.reporting.rows import Row, group_of
from unperturb.benchmarks.reporting.sections import Section, Summary, in_words, notes_of, tone

ASSETS = Path(__file__).resolve().parent / "assets"
LEAST_SCALE = 0.05  # how far the scale of the gains reaches at least, as a share of 1
PICTURES = {
    "clean": "clean",
    "attack": "attack, amplified",
    "attacked": "attacked",
    "purification": "purification, amplified",
    "purified": "purified",
}


def page(
    title: str,
    sections: Sequence[Section],
    *,
    plots: Mapping[str, tuple[bytes, bytes]],
    runs: Sequence[dict[str, Any]],
    summary: Summary | None = None,
) -> str:
    """Return the page; of each plot it takes a PNG file for light screens and one for dark ones."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    return environment.get_template("report.html").render(
        title=title,
        legend=c.LEGEND,
        notes=notes_of(sections),
        summary=summary,
        pictures=PICTURES,
        tables=[_table(section) for section in sections],
        plots={name: [base64.b64encode(png).decode() for png in both] for name, both in plots.items()},
        panels=[run["results"] for run in runs if run["results"].get("panel")],
        runs=[_run(run) for run in runs],
    )


def _shown(text: str) -> Markup:
    """Return a text with real minus signs, what stands between backticks as code, and names that may be broken."""
    escaped = str(escape(c.with_minus(text, "\N{MINUS SIGN}")))
    coded = re.sub("`([^`]+)`", r"<code>\1</code>", escaped)
    return Markup(re.sub("(?<=[_,])(?=[A-Za-z])", "<wbr>", coded))


def _name(row: Row) -> c.Cell:
    return c.Cell(row.purifier, row.model, row.purifier) if row.measured else c.Cell(row.model, key=row.model)


NAME = c.Column("classifier and purifier", _name, number=False)


def _table(section: Section) -> dict[str, Any]:
    """Return a section as the template takes it."""
    columns, near = (NAME, *section.columns), set(section.near)
    ends = [abs(end) for row in section.ours for end in row.gain_interval or ()]
    scale = max([LEAST_SCALE, *ends])
    lines = [
        {
            "measured": row.measured,
            "far": not row.measured and row not in near,
            "cells": [(column, column.cell(row)) for column in columns],
            "scale": _on_scale(row, scale),
            "remarks": section.remarks(row),
        }
        for row in (*section.ours, *section.published)
    ]
    return {
        "title": section.title,
        "said": [] if section.across else [(tone(row), in_words(row)) for row in section.ours if row.gain_interval],
        "heads": columns,
        "gain": c.GAIN,
        "lines": lines,
        "few": section.few,
        "published": len(section.published),
        "near": len(near),
    }


def _on_scale(row: Row, scale: float) -> dict[str, Any] | None:
    """Return where a gain and its interval lie from 0 to 100, no gain in the middle."""
    if row.gain is None or row.gain_interval is None:
        return None
    low, mean, high = (50 + 50 * value / scale for value in (row.gain_interval[0], row.gain, row.gain_interval[1]))
    return {"low": round(low, 2), "width": round(high - low, 2), "mean": round(mean, 2), "tone": tone(row)}


def _run(run: dict[str, Any]) -> dict[str, Any]:
    """Return what made a run, and its figure of every attack."""
    found, config = run["results"], run["config"]
    facts = {
        "model": found["model"]["spec"],
        "threat": c.threat_of(group_of(run)),
        "budget": found["budget"]["name"],
        "seed": config["seed"],
        "images": f"{len(found['indices']):,} of {found['data']['dataset']}, {found['data']['source']}, "
        f"SHA-256 {found['data']['sha256'][:12]}",
        "flags": _flags(found.get("flags")),
        "notes": "; ".join(found.get("notes", [])),
        "commit": _commit(run["commit"]),
        "device": where(run["machine"]),
        "finished": run["finished_at"],
    }
    return {
        "purifier": found["purifier_spec"],
        "facts": {name: value for name, value in facts.items() if value not in ("", None)},
        "attacks": {name: _attack(cell) for name, cell in found["figures"]["attacks"].items()},
    }


def _flags(flags: dict[str, Any] | None) -> str:
    if flags is None:
        return ""
    zeros = f"zero gradients on {flags['zero_gradients']} of {flags['of_images']} images"
    zeros += ", unless one goes through its steps" * flags["optimisation_loop"]
    said = {
        "randomised": flags["randomised"],
        "loop inside": flags["optimisation_loop"],
        zeros: flags["zero_gradients"],
    }
    return ", ".join(text for text, holds in said.items() if holds)


def _commit(commit: str | None) -> str:
    name, _, changes = (commit or "").partition("+")
    return name[:12] + f"+{changes}" * bool(changes)


def _attack(cell: dict[str, Any]) -> list[str]:
    attacked, broken = (f"{cell[name]:,}" if name in cell else "" for name in ("attacked", "broken"))
    cells = (cell.get(name) for name in ("left", "alone"))
    left, alone = (c.percent(one["accuracy"], one["interval"]).whole if one else "" for one in cells)
    return [attacked, broken, left, alone]
