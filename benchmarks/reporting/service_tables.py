"""The tables of the service, from the results of the scripts in benchmarks/serving/."""

import statistics
from collections.abc import Sequence
from typing import Any

from unperturb.benchmarks.reporting.results import where

SHARES = ("answered_within", "work_within")  # of side_by_side.py
RATIO = "p99_at_ten_times_over_at_its_share"  # of shares.py


def load_table(record: dict[str, Any]) -> str:
    """Latency and rejections against offered load."""
    found = record["results"]
    offered = f"offered, of {found['capacity']:.0f} images/s; {where(record['machine'])}"
    rows = [
        f"| {offered} | answered/s | refused | p50 ms | p95 ms | p99 ms |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| one request to an idle server | | | {found['solo_ms']:.0f} | | |",
        f"| one request right after another | | | {found['back_to_back_ms']:.0f} | | |",
    ]
    for row in found["loads"]:
        cells = [
            f"{row['share']:.0%}",
            f"{row['goodput']:.1f}",
            f"{row['rejected']:.1%}",
            *(f"{row[f'p{p}_ms']:.0f}" for p in (50, 95, 99)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    rows += [
        "",
        f"At 80% p99 is {found['p99_at_80_over_solo']:.1f} times the request to an idle server, at 300% goodput is "
        f"{found['goodput_at_300_over_best']:.0%} of the best row's (each the median of the rounds' own ratios), "
        f"and the client takes {found['loads'][-1]['client_cores']:.2f} of the cores; "
        f"statuses: {', '.join(found['statuses'])}.",
    ]
    return "\n".join(rows)


def shares_table(record: dict[str, Any]) -> str:
    """Two clients, and two presets, of a service asked for too much; medians of the rounds, refusals of all of them."""
    rounds = record["results"]["rounds"]
    times = [row["times_its_share"] for row in rounds[0]["clients"]["rows"]]
    lines = [
        f"| the other offers; {where(record['machine'])} | answered of the modest client | p50 ms | p95 ms | p99 ms "
        "| the other: answered/s | refused |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for i, share in enumerate(times):
        modest, other = ([one["clients"]["rows"][i][whose] for one in rounds] for whose in ("modest", "other"))
        found = medians(modest, "p50_ms", "p95_ms", "p99_ms")
        cells = [
            f"{share:g} times its share" if share else "nothing",
            f"{1 - _refused(modest):.1%}",
            *("" if value is None else f"{value:.0f}" for value in found.values()),
            *([f"{medians(other, 'goodput')['goodput']:.1f}", f"{_refused(other):.0%}"] if share else ["", ""]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    mixed = [one["presets"] for one in rounds]
    lines += [
        "",
        f"| preset, {record['config']['load']:.0%} of the capacity for both | requests | answered | p50 s | p99 s "
        "| share of the work done |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in mixed[0]["presets"]:
        seen = [one["presets"][name] for one in mixed]
        found = medians(seen, "p50_ms", "p99_ms", "share_of_work")
        cells = [
            f"`{name}`",
            f"{sum(one['requests'] for one in seen):,}",
            f"{1 - _refused(seen):.0%}",
            *("" if found[key] is None else f"{found[key] / 1000:.2f}" for key in ("p50_ms", "p99_ms")),
            f"{found['share_of_work']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ratio = medians([one["clients"] for one in rounds], RATIO)[RATIO]
    wasted, steps = (sum(one[key] for one in mixed) for key in ("steps_not_answered", "steps"))
    lines += [
        "",
        "With ten times its share instead of its share the other "
        + (
            "leaves the modest client no answer"
            if ratio is None
            else f"makes the modest client's p99 {ratio:.2f} times as long"
        )
        + f". Of mixed presets {wasted / max(steps, 1):.1%} of the steps were of images that were not answered.",
    ]
    return "\n".join(lines)


def medians(rows: Sequence[dict[str, Any]], *keys: str) -> dict[str, Any]:
    """Return each key's median over the rows that have a value for it; None where none has."""
    known = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    return {key: statistics.median(values) if values else None for key, values in known.items()}


def _refused(rows: Sequence[dict[str, Any]]) -> float:
    """Return the share of the requests of several summaries that were not answered with 200."""
    requests: int = sum(row["requests"] for row in rows)
    answered: int = sum(row["statuses"].get("200", 0) for row in rows)
    return 1 - answered / max(requests, 1)


def side_by_side_table(record: dict[str, Any]) -> str:
    """Three servers under the same arrivals; the median of the rounds."""
    found, config = record["results"], record["config"]
    rows = [
        f"| load, of {found['capacity']:.1f} images/s | server | answered within {config['within_s']:g} s "
        "| work within it | work/s until the last answer | p99 of `default`, s | of `published`, s "
        "| not answered of `default` | of `published` |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in config["loads"]:
        for name, loads in found["servers"].items():
            turns = loads[load]
            cells = [f"{statistics.median(turn[key] for turn in turns):.0%}" for key in SHARES]
            cells.append(f"{statistics.median(turn['work'] for turn in turns):.1f}")
            presets = [
                [turn["presets"][preset] for turn in turns if preset in turn["presets"]]
                for preset in ("default", "published")
            ]
            for seen in presets:
                known = [one["p99_ms"] / 1000 for one in seen if one["p99_ms"] is not None]
                cells.append(f"{statistics.median(known):.1f}" if known else "")
            cells += [f"{statistics.median(one['rejected'] for one in seen):.0%}" if seen else "" for seen in presets]
            rows.append(f"| {float(load):.0%} | {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def faults_table(record: dict[str, Any]) -> str:
    """Each part and how it ended."""
    found = record["results"]
    rows = ["| fault | what was seen | well |", "| --- | --- | --- |"]
    for name, words in WORDS.items():
        if name in found:
            rows.append(
                f"| {name.replace('_', ' ')} | {words(found[name])} | {'yes' if found[name]['well'] else '**no**'} |"
            )
    return "\n".join(rows)


def dashboard_queries_table(record: dict[str, Any]) -> str:
    """What Prometheus answers to each query of deploy/; a condition of an alert answers 0 or 1."""
    found = record["results"]
    rows = [
        f"| asked of Prometheus {found['prometheus']} by | query | series | least | most |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in found["queries"]:
        none = "none: no GPU here" if row["well"] else "**none**"
        cells = [f"{row['series']}", f"{row['least']:.3g}", f"{row['most']:.3g}"] if row["series"] else [none, "", ""]
        rows.append(f"| {row['user']} | {row['name']} | {' | '.join(cells)} |")
    load, seconds = found["load"], record["config"]["seconds"]
    without = sum(not row["well"] for row in found["queries"])
    rows += [
        "",
        f"{len(found['queries'])} queries, {without or 'none'} of them without an answer that should have one; "
        f"{load['requests']:,} requests in {seconds:.0f} s: {_counts(load['statuses'])}.",
    ]
    return "\n".join(rows)


def bulk_line(record: dict[str, Any]) -> str:
    """The memory of a bulk run."""
    found = record["results"]
    return (
        f"{found['count']:,} images in one process (`python benchmarks/serving/bulk_memory.py`): "
        f"{found['rss_after_first_chunk_mib']:,.0f} MiB of memory after the first {record['config']['chunk']}, "
        f"{found['peak_rss_mib']:,.0f} MiB at most, with `{found['checkpoint']['id']}` as it was on "
        f"{record['finished_at'][:10]}."
    )


def _counts(statuses: dict[str, int]) -> str:
    named = {"0": "no answer"}
    ordered = sorted(statuses.items(), key=lambda pair: pair[0] in named)
    return ", ".join(f"{named.get(status, status)}: {count:,}" for status, count in ordered)


def _mutated(part: dict[str, Any]) -> str:
    return "; ".join(f"{kind}: {_counts(counts)}" for kind, counts in part["statuses"].items())


def _bombs(part: dict[str, Any]) -> str:
    slowest = max(row["slowest_s"] for row in part["bombs"].values())
    seen = sorted({status for row in part["bombs"].values() for status in row["statuses"]})
    return f"{len(part['bombs'])} kinds, four at once: {', '.join(seen)}; slowest {slowest:.1f} s"


def _soak(part: dict[str, Any]) -> str:
    growth = part["memory_growth_after_warm_up"]
    return (
        f"{part['minutes']:.0f} minutes at {part['offered']:.0f} images/s, over capacity: {_counts(part['statuses'])}; "
        f"memory {growth:+.1%} after warm-up"
    )


WORDS = {
    "killed": lambda part: (
        f"worker killed under load: {_counts(part['statuses'])}, these only after its end; exit "
        f"status {part['exit_status']}; started anew it answers"
    ),
    "disconnects": lambda part: (
        f"100 clients left beside 100 that stayed: {_counts(part['stayed']['statuses'])}; "
        f"{part['images_left_over']:.0f} images left over"
    ),
    "slow_loris": lambda part: (
        f"200 stalled connections: {_counts(part['stalled'])}; others: {_counts(part['others']['statuses'])}"
    ),
    "mutated": _mutated,
    "bombs": _bombs,
    "schemathesis": lambda part: f"{part['minutes']:.0f} minutes over the whole OpenAPI: {_counts(part['requests'])}",
    "soak": _soak,
}
