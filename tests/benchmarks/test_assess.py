import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch

from tests.conftest import make_checkpoint
from unperturb.benchmarks import assess
from unperturb.benchmarks.reporting.assessment import Judged, summary, verdict
from unperturb.benchmarks.reporting.rows import Group, Row
from unperturb.models.checkpoints import store


def judged(name: str, gain: float, *, clean: float = 0.0, transfer: float = 0.0) -> Judged:
    row = Row(
        group=Group("own", "Linf", 8 / 255, True),
        model="m",
        purifier=name,
        measured=True,
        n=200,
        clean=0.8,
        worst=0.3 + gain,
        gain=gain,
        gain_interval=(gain - 0.01, gain + 0.01),
        clean_gain=clean,
        clean_gain_interval=(clean, clean),
        ms_per_image=2.0,
    )
    return Judged(row, {"mean": transfer, "interval": [transfer - 0.02, transfer + 0.02]})


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([judged("default", 0.05), judged("vote", 0.03), judged("transfer", -0.1)], "use `default`: +5.0 ("),
        ([judged("default", 0.05, clean=-0.1), judged("vote", 0.03)], "use `vote`"),
        (
            [judged("default", -0.05), judged("vote", 0.005, transfer=0.1)],
            "use `vote` against attackers",
        ),
        ([judged("default", -0.05), judged("transfer", -0.2)], "don't purify: every preset makes this model worse"),
        ([judged("default", 0.005), judged("transfer", -0.2)], "don't purify: no preset makes a difference"),
        ([], "nothing was measured"),
        (
            [judged("vote", 0.0), judged("transfer", -0.2), judged("restorer", 0.33, clean=-0.3)],
            "don't purify where no attack is to be expected; where one is, `restorer`: +33.0 (+32.0 to +34.0) points "
            "in the worst case, -30.0 (-30.0 to -30.0) on clean images",
        ),
        (
            [judged("vote", 0.03), judged("restorer", 0.33, clean=-0.3)],
            "use `vote`: +3.0 (+2.0 to +4.0) points in the worst case; where attacks are to be expected, `restorer`",
        ),
        (
            [judged("vote", 0.03), judged("restorer", 0.02, clean=-0.3)],
            "use `vote`: +3.0 (+2.0 to +4.0) points in the worst case",
        ),
    ],
    ids=["best", "clean loss", "unaware", "worse", "even", "none", "trade", "both", "trade for less"],
)
def test_verdict_follows_the_worst_case(rows: list[Judged], says: str) -> None:
    assert verdict(rows).startswith(says)


def test_summary_has_the_gains_against_both_attackers_with_their_intervals() -> None:
    bare = judged("none", 0.0)
    bare = bare._replace(row=replace(bare.row, gain=None, static=0.25, worst=0.2), transfer=None)
    vote = judged("vote", 0.03, clean=-0.01, transfer=0.1)
    shown = summary([bare, vote], {"n": 200, "verdict": "use `vote`"}, headless=["default", "transfer"])
    assert shown.rows == [
        ("none", "80.0%", "25.0%", "20.0%", "2.0"),
        ("vote", "-1.0 (-1.0 to -1.0)", "+10.0 (+8.0 to +12.0)", "+3.0 (+2.0 to +4.0)", "2.0"),
    ]
    assert shown.below[1:] == ["not measured, for want of a head: default, transfer"]
    lines = assess.lines_of(shown)
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[1].split() == ["none", "80.0%", "25.0%", "20.0%", "2.0"]


@pytest.mark.parametrize(("side", "count"), [(32, 128), (224, 5), (1024, 1)])
def test_few_large_images_are_attacked_at_once(side: int, count: int) -> None:
    assert assess.chunk_of(torch.zeros(2, 3, side, side)) == count


def arguments(folder: Path, images: Path, out: Path, *more: str) -> list[str]:
    given = [str(folder), "--data", str(images), "--images", "6", "--device", "cpu", "--out", str(out)]
    return [*given, "--cache", str(out.parent / "cache"), *more]


def read(folder: Path) -> list[str]:
    """The report as Markdown, and what one reads of its page."""
    page = re.sub("<script>.*?</script>|<style>.*?</style>", "", (folder / "report.html").read_text(), flags=re.DOTALL)
    plain = re.sub("<[^>]+>", " ", page.replace("<code>", "`").replace("</code>", "`"))
    return [(folder / "report.md").read_text(), unescape(plain).replace("\N{MINUS SIGN}", "-")]


def test_each_preset_is_measured_and_written_onto_the_card(
    tiny_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    store.save(folder, store.load(tiny_folder))
    assert assess.main(arguments(folder, image_folder, tmp_path / "out", "--images", "-1")) == 2
    assert "images=-1" in capsys.readouterr().err
    assert assess.main(["default", *arguments(folder, image_folder, tmp_path / "out", "--write-card")[1:]]) == 2
    assert "no checkpoint's folder of your own" in capsys.readouterr().err
    presets = ("--presets", "transfer", "--presets", "vote")
    assert assess.main(arguments(folder, image_folder, tmp_path / "out", *presets, "--write-card")) == 0
    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines() if line} >= {"none", "transfer", "vote"}
    gained = re.search(r"^transfer +(\S+ \(.*?\)) +(\S+ \(.*?\))", said, re.MULTILINE)
    assert gained is not None
    for page in read(tmp_path / "out"):  # as the terminal has it
        assert said.splitlines()[-1] in page
        assert re.search(rf"transfer\W+{re.escape(gained[1])}\W+{re.escape(gained[2])}", page)
        assert "leaderboard" not in page  # of images that stand on none
    card = store.load(folder).card
    found = card.figures["assessment"]
    assert set(found["presets"]) == {"none", "transfer", "vote"}
    assert found["verdict"] == said.splitlines()[-1]
    assert found["n"] == 6
    written = json.loads((tmp_path / "out" / "assessment.json").read_text())
    assert written["results"] == json.loads(json.dumps(found))
    assert written["script"] == assess.SCRIPT
    assert written["config"]["checkpoint"] == card.id
    assert written.keys() >= {"schema_version", "commit", "versions", "machine", "finished_at"}
    assert str(tmp_path) not in json.dumps([found, written])


def test_checkpoint_without_a_head_is_assessed_by_what_needs_none(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(tmp_path / "bare", make_checkpoint(head=False))
    assert assess.main(arguments(tmp_path / "bare", image_folder, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    for told in (said, *read(tmp_path / "out")):
        assert "not measured, for want of a head: default, transfer" in told
    assert assess.main(arguments(tmp_path / "bare", image_folder, tmp_path / "out", "--presets", "default")) == 2
    assert "unperturb train head" in capsys.readouterr().err
    assert assess.main(arguments(tmp_path / "bare", image_folder, tmp_path / "out", "--presets", "best")) == 2
    assert "'best' is not one of" in capsys.readouterr().err
