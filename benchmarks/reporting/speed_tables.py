"""The table of the purifier's speed, and the table on HTTP, from purify_speed.py and http_cost.py."""

import statistics
from typing import Any

from unperturb.benchmarks.reporting.results import where

PLAIN = "published procedure"


def speed_table(record: dict[str, Any]) -> str:
    """A row a way, a column a batch size: images a second, times the published procedure, share of the rate."""
    found, batches = record["results"], record["results"]["batches"]
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in found["flop_per_s"].items())
    head = (f"`{found['architecture']}`, {where(record['machine'])}", "steps x views", *(f"batch {n}" for n in batches))
    rows = [
        f"| {' | '.join(head)} |",
        f"| --- | --- | {' | '.join('---' for _ in batches)} |",
    ]
    for name, any_size in next(iter(batches.values())).items():
        cells = []
        for ways in batches.values():
            one = ways[name]
            times = "" if name == PLAIN else f", {one['times_published_procedure']:.1f}x"
            cells.append(f"{one['images_per_s']:.1f}/s{times}, {one['of_rate']:.0%}")
        ways_taken = dict.fromkeys(one[name]["way"] for one in batches.values())
        title = f"{name} ({' / '.join(ways_taken)})" if name.startswith("preset") else name
        rows.append(f"| {title} | {any_size['steps']} x {any_size['views']} | {' | '.join(cells)} |")
    rows += [
        "",
        f"Images a second, times the published procedure's, and the share of what this device reaches in a large "
        f"matrix product ({rates}); medians of {record['config']['blocks']} turns.",
    ]
    for name, one in found.get("agreement", {}).items():
        margin = one["largest_margin_of_the_differing"]
        rest = "" if margin is None else f"; where it differs, the two best scores were at most {margin:.3f} apart"
        same = f"the same label as eager float32 on {one['same_label']:.1%} of {one['n']:,} test images{rest}."
        rows += ["", f"{name}, preset `default`: {same}"]
    return "\n".join(rows)


def http_table(records: list[dict[str, Any]]) -> str:
    """Return the table of what the service reaches of the engine alone, a row for each way to run both."""
    turns = sorted({record["config"]["turns"] for record in records})
    rows = [
        f"| medians of {' or '.join(map(str, turns))} turns | workers | steps | engine alone, images/s | service "
        "| share, median of each turn's | a lone request |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        found, config = record["results"], record["config"]
        engine, service = (statistics.median(found[f"{name}_images_per_s"]) for name in ("engine", "service"))
        how = f"{config['execution']}, {config['precision']}"
        rows.append(
            f"| `{config['preset']}` | `{config['device']}`: {where(record['machine'])} | {how} | {engine:.1f} "
            f"| {service:.1f} | {found['share']:.1%} | {found['lone_ms']:.0f} ms |"
        )
    return "\n".join(rows)
