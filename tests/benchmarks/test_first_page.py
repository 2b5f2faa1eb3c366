"""The figures of the first page: the headline, and the picture that is chosen for it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.support.records import NO_SIGNS, Outcomes, averaged_record, in_order, record, write
from unperturb.benchmarks.purifier import picture
from unperturb.benchmarks.reporting import tables
from unperturb.benchmarks.reporting.columns import LEGEND
from unperturb.benchmarks.reporting.first_page import headline
from unperturb.benchmarks.reporting.purifier_tables import robustness_table, threats_table
from unperturb.benchmarks.reporting.results import gain
from unperturb.benchmarks.reporting.rows import load_runs
from unperturb.benchmarks.reporting.when import when_table
from unperturb.benchmarks.robustness.identity import describe
from unperturb.models.attacks.pgd import pgd
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.pixels import Preprocessing
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.registry import build_defense
from unperturb.models.purifiers.reverse_attack import preset
from unperturb.service.demo import EPSILON
from unperturb.service.http.worth import worth_of

CONFIG = picture.PictureConfig(data="nowhere", n=6, batch=4, device="cpu")


N = 1200
BARE = in_order({"clean": 300, "apgd-ce": 250, "autoattack": 50}, N)  # 600 of 1,200 are left
KNOWN = in_order({"clean": 360, "transfer": 100, "transfer-further": 20, "intermediate": 360}, N)  # 360 are left
HELPED = in_order({"clean": 300, "transfer": 0, "transfer-further": 60, "intermediate": 120}, N)  # 720 are left
EVEN = in_order({"clean": 300, "transfer": 0, "transfer-further": 0, "intermediate": 301}, N)  # 599 are left


def lines_of(*runs: dict[str, Any]) -> list[str]:
    return headline([record(BARE), *runs]).splitlines()


def test_headline_is_the_paired_gain_of_the_default_and_says_that_it_makes_things_worse() -> None:
    known, unknown, clean, *_ = lines_of(record(KNOWN, BARE))
    paired = gain([False] * 840 + [True] * 360, [False] * 600 + [True] * 600)
    low, high = (100 * end for end in paired["interval"])
    assert f"**-20.0 ({low:+.1f} to {high:+.1f}) points**, n = 1,200" in known
    assert "makes things worse" in known
    assert "the worst of 3 attacks, budget `fast`" in known
    assert "50.0% of the images withstand without it, 30.0% with it" in known
    assert "**+10.0 (+8.3 to +11.7) points**" in unknown  # 720 withstand AutoAttack's images, 600 do without it
    assert clean.startswith("- Preset `default` on **clean** images: -5.0 (-")


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [(HELPED, "it helps, also against an attacker who knows it"), (EVEN, "no difference can be told")],
    ids=["above 0", "around 0"],
)
def test_headline_says_no_worse_where_the_interval_is_not_below_0(outcomes: Outcomes, says: str) -> None:
    known = lines_of(record(outcomes, BARE))[0]
    assert says in known
    assert "worse" not in known


def test_headline_has_the_vote_where_it_was_run() -> None:
    vote = lines_of(record(KNOWN, BARE), record(HELPED, BARE, purifier="vote:views=8"))[1]
    assert vote.startswith("- The vote alone (`vote:views=8`), likewise (the worst of 3): **+10.0 (+")
    assert "n = 1,200; it helps" in vote
    assert "Over the vote `default` gains -30.0 (" in vote
    weaker = record(KNOWN, BARE)
    weaker["results"]["figures"]["weaker"] = ["too little"]
    beside = lines_of(weaker, record(HELPED, BARE, purifier="vote:views=8"))[1]
    assert "Over the vote `default` gains ≤ -30.0 (to -" in beside
    assert not any("vote" in line for line in lines_of(record(KNOWN, BARE)))


def test_headline_marks_few_images() -> None:
    few, bare = ({name: values[::2] for name, values in of.items()} for of in (KNOWN, BARE))
    text = "\n".join(headline([record(bare), record(few, bare)]).splitlines())
    assert "n = 600 †" in text
    assert LEGEND in text
    assert "†" not in "\n".join(lines_of(record(KNOWN, BARE)))


def test_headline_without_transfer_says_nothing_of_it() -> None:
    without = {name: values for name, values in KNOWN.items() if name != "transfer-further"}
    assert not any("does not know" in line for line in lines_of(record(without, BARE)))


def test_headline_refuses_two_runs_of_one_purifier_and_none_of_the_default() -> None:
    with pytest.raises(ValueError, match="two runs of 'none'"):
        headline([record(BARE), record(BARE), record(KNOWN, BARE)])
    with pytest.raises(ValueError, match="no run of 'reverse-attack'"):
        headline([record(BARE)])


def test_table_of_what_helps_when_has_every_purifier_and_says_what_was_not_run() -> None:
    main = [record(BARE), record(KNOWN, BARE), record(HELPED, BARE, purifier="reverse-attack:published")]
    main.append(record(HELPED, BARE, purifier="vote"))
    corrupted = averaged_record({"clean": [1, 1], "fog-1": [1, 1]}, {"clean": [1, 1], "fog-1": [1, 0]})
    asked = record(HELPED, BARE, purifier="vote")
    elses = record(KNOWN, BARE, purifier="vote")
    elses["results"]["model"]["spec"] = "another"
    lines = when_table(main, [*main, corrupted], [asked, elses]).splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [row[0] for row in rows] == ["preset `default`", "preset `published`", "`vote`"]
    default, published, vote = (dict(zip(head, row, strict=True)) for row in rows)
    assert default["knows everything"].startswith("-20.0 (")
    assert default["does not know of it, AutoAttack"].startswith("+10.0 (")
    assert default["15 corruptions, generated"].startswith("+50.0 (")
    assert default["clean images"].startswith("-5.0 (")
    assert default["n"] == "1,200"
    assert published["15 corruptions, generated"] == published["knows not even the classifier"] == "not run"
    assert vote["knows not even the classifier"] == vote["knows everything"]
    assert "knows not even the classifier" not in when_table(main, [*main, corrupted])
    assert vote["Gaussian noise"] == "not run"


def test_table_of_what_helps_when_has_what_is_served_though_nobody_has_judged_it() -> None:
    cell = {"gain": {"mean": 0.02, "interval": [0.01, 0.03]}}
    less = {"gain": {"mean": -0.5, "interval": [-0.6, -0.4]}}
    accuracy = {"default": {"attacked": cell, "clean": cell}, "transfer": {"attacked": cell, "clean": less}}
    purified = {
        "results": {
            "checkpoint": {"id": "tiny"},
            "accuracy": accuracy,
            "time": {"ms_per_image": {"classifier": 2.0, "default": 8.0, "transfer": 8.0}},
        }
    }
    judged = record(HELPED, BARE, purifier="vote")
    head, _, *rows = when_table([record(BARE), judged], [], [], [purified], served="tiny").splitlines()
    names = [cell.strip() for cell in head.strip("|").split(" | ")]
    default, vote, _ = (dict(zip(names, row.strip("| ").split(" | "), strict=True)) for row in rows)
    assert (default["purifier"], vote["purifier"]) == ("preset `default`", "`vote`")
    assert default["does not know of it, PGD-20"] == default["clean images"] == "+2.0 (+1.0 to +3.0)"
    assert default["times the classifier's time"] == "4.0"
    assert default["knows everything"] == default["does not know of it, AutoAttack"] == "not run"
    *table, blank, below = when_table([record(BARE), judged], [], [], [purified]).splitlines()
    assert (len(table), blank) == (3, "")  # the worst of what was measured stands there, though not as a line
    assert below.startswith("- not in the table, points on clean images and under PGD-20")
    assert below.endswith(": before `tiny` `default` +2.0 and +2.0, `transfer` -50.0 and +2.0")
    noted = record(HELPED, BARE, purifier="vote", could_not_run={"square": "too large"})
    *_, before, below = when_table([record(BARE), noted], [], [], [purified]).splitlines()
    assert before.startswith("- `vote`")
    assert below.startswith("- not in the table")


def test_robustness_table_has_every_purifier_its_signs_and_what_was_not_run() -> None:
    signs = {**NO_SIGNS, "warnings": ["twice the iterations break 9 images more"]}
    found = [record(BARE), record(KNOWN, BARE, signs=signs, could_not_run={"square": "too large"})]
    text = robustness_table(found)
    assert "| `none` |  | 1,200 | 50.0 (" in text
    assert "| `reverse-attack` | -20.0 (" in text
    assert "- `reverse-attack`, L∞ 8/255: gradients may be masked: twice the iterations break 9 images more" in text
    assert "- `reverse-attack`, L∞ 8/255: square could not be run: too large" in text
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("| ")}) == 1
    with pytest.raises(ValueError, match="2 threats"):
        robustness_table([*found, record(KNOWN, BARE, threat="L2", epsilon=0.5)])


def test_threats_table_has_a_row_for_each_purifier_and_threat() -> None:
    corrupted = {"clean": [1, 1, 1, 0], "fog-1": [1, 0, 0, 0]}
    whole = {"clean": [1, 1, 1, 1], "fog-1": [1, 1, 1, 0]}
    runs = [
        record(BARE),
        record(KNOWN, BARE),
        record(HELPED, BARE, purifier="hedge"),
        record(HELPED, BARE, threat="L2", epsilon=0.5),
        averaged_record(corrupted, whole),
        averaged_record(corrupted, whole, threat="noise"),
    ]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in threats_table(runs).splitlines()[2:8]]
    assert [(row[0], row[1]) for row in rows[:5]] == [
        ("`reverse-attack`", "L∞ 8/255"),
        ("`reverse-attack`", "L2 0.5"),
        ("`reverse-attack`", "generated corruptions"),
        ("`reverse-attack`", "Gaussian noise"),
        ("`hedge`", "L∞ 8/255"),
    ]
    assert rows[1][2].startswith("+10.0 (")
    assert rows[1][3] == "1,200"
    assert rows[1][4].startswith("60.0 (")
    assert rows[1][5] == "50.0"
    assert rows[2][2].startswith("-50.0 (")
    assert rows[2][3:] == ["4 †", "25.0", "75.0"]


def test_every_place_of_the_pages_is_filled_from_the_shipped_checkpoints_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = store.read_card(store.resolve("default")).id
    runs = {"none": record(BARE, model=shipped), "default": record(KNOWN, BARE, model=shipped)}
    runs |= {"l2": record(HELPED, BARE, threat="L2", epsilon=0.5, model=shipped), "another": record(BARE)}
    natural = store.read_card(store.resolve("cifar10-natural")).id
    runs |= {"before": record(BARE, model=natural), "behind": record(HELPED, BARE, purifier="restorer", model=natural)}
    for name, run in runs.items():
        write(tmp_path, name, run)
    monkeypatch.setattr(tables, "ROBUSTNESS", tmp_path)
    made = tables.all_tables()
    assert made["frozen"] == robustness_table([runs["before"], runs["behind"]])
    lines = [line.split(" | ") for line in made["when"].splitlines()[2:] if line.startswith("|")]
    assert list(dict.fromkeys(before for before, *_ in lines)) == [f"| `{shipped}`", f"| `{natural}`"]
    named = [name for _, name, *_ in lines[:-1]]  # those that were not judged have what purification.py measured
    assert named == ["preset `default`", "`vote`", "preset `transfer`", "preset `published`"]
    assert all(pgd[0] in "+-" and unknowing == "not run" for _, _, _, pgd, unknowing, *_ in lines[1:-1])
    assert "PGD-20 alone, " in made["picture"]
    assert made["headline"] == headline([runs["none"], runs["default"]])
    assert made["robustness"] == robustness_table([runs["none"], runs["default"]])
    assert made["threats"].count("`reverse-attack` |") == 2
    texts = [page.read_text() for page in tables.pages()]
    assert {name for text in texts for name in tables.places(text)} == set(made)
    for text in texts:
        tables.render(text, made)


def test_every_run_of_a_shipped_checkpoint_is_of_what_its_specification_means_today() -> None:
    """A preset that changes takes its figures with it: they are measured again, or named by their parameters."""
    shipped = {store.read_card(store.resolve(name)).id: name for name in store.shipped_names()}
    for run in load_runs(tables.ROBUSTNESS):
        found = run["results"]
        built = describe(build_defense(found["purifier_spec"], store.load(shipped[found["model"]["spec"]])))
        then = found["purifier"]
        assert built["kind"] == then["kind"], found["purifier_spec"]
        assert json.loads(json.dumps(built["vote"])) == then["vote"], found["purifier_spec"]
        assert {name: built["loop"][name] for name in then["loop"]} == then["loop"], found["purifier_spec"]
        if config := then.get("config"):
            today = json.loads(json.dumps(built["config"]))
            for name in ("views", "temperature", "negatives", "policy"):
                assert today[name] == config[name], (found["purifier_spec"], name)


def test_shipped_cards_say_what_the_harness_found() -> None:
    assessed = tables.assess_shipped()
    assert assessed
    for name in store.shipped_names():
        card = store.read_card(store.resolve(name))
        assert card.figures.get("assessment") == json.loads(json.dumps(assessed.get(name)))
    for name, found in assessed.items():
        card = store.read_card(store.resolve(name))
        judged = {which: one for which, one in found["presets"].items() if one["gain"] is not None}
        assert judged
        for which, one in judged.items():
            worth = worth_of(card, which)
            assert worth is not None
            assert (worth.n, worth.knows_everything and worth.knows_everything.mean) == (found["n"], one["gain"])


def test_counts_are_those_of_the_attacks_own_points() -> None:
    loaded = store.load("small")
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = loaded.classifier(images.float() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # one that the classifier has wrong
    defended = defend(loaded, preset("default"))
    counts, chosen = picture.count(CONFIG, defended, images, labels)
    attacked = pgd(
        loaded.classifier,
        images.float() / 255,
        labels,
        epsilon=EPSILON,
        step_size=EPSILON / 4,
        steps=picture.PGD_STEPS,
        seeds=torch.arange(6),
    )
    answer = defended.classify(attacked, seed=0)
    withstood, back = answer.unpurified_logits.argmax(1) == labels, answer.logits.argmax(1) == labels
    changed = [i for i in range(1, 6) if not withstood[i]]
    assert counts["n"] == 6
    assert counts["right"] == 5
    assert counts["changed_by_attack"] == len(changed)
    assert sorted(chosen) == [i for i in changed if back[i]]
    assert counts["brought_back"] == len(chosen)
    assert counts["spoiled"] == int((withstood & ~back).sum())


def test_picture_is_of_the_first_image_that_the_demo_brings_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        0.0: ["original: cat 90%", "attacked: cat 80%", "purified: cat 85%", "wrote it"],
        1.0: ["original: cat 90%", "attacked: dog 80%", "purified: cat 85%", "wrote it"],
    }

    def run_demo(defended: object, card: object, x: torch.Tensor, **given: object) -> Iterator[str]:
        yield from lines[float(x.max())]

    monkeypatch.setattr(picture, "run_demo", run_demo)
    loaded = store.load("small")
    defended = defend(loaded, preset("default"))
    images = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    assert picture.draw(CONFIG, defended, loaded, images, [1, 2, 0]) == 2
    with pytest.raises(ConfigError, match="nothing to draw"):
        picture.draw(CONFIG, defended, loaded, images, [0, 1])


def test_squares_are_cut_where_they_say_from_whole_to_half() -> None:
    drawing = Image.effect_noise((64, 64), 80).convert("RGB")
    places, cut = picture.squares(drawing, Preprocessing(size=32))
    assert cut.shape == (len(places), 3, 32, 32)
    assert {at.side for at in places} == {32, 48, 64}
    at = next(i for i, place in enumerate(places) if place == (32, 16, 32))
    assert torch.equal(cut[at], pil_to_tensor(drawing.crop((16, 32, 48, 64))))
