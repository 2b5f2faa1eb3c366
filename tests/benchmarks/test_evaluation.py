import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import make_checkpoint, make_images
from tests.support import broken_defenses
from tests.support.broken_defenses import FineAndCoarse, RandomResizing, Replay, Rounding
from tests.support.real_images import first_test_images, real_images
from unperturb.benchmarks.reporting.results import gain
from unperturb.benchmarks.reporting.tables import in_main_ball, robustness_runs
from unperturb.benchmarks.robustness.attacks import NAMES
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.data import EvaluationSet
from unperturb.benchmarks.robustness.evaluation import Evaluation
from unperturb.benchmarks.robustness.figures import NO_AUTOATTACK, NO_JUDGE, Outcomes, merge, summarise
from unperturb.benchmarks.robustness.plan import Plan
from unperturb.benchmarks.robustness.subjects import defense_of, ready
from unperturb.benchmarks.robustness.threat import Threat
from unperturb.benchmarks.robustness.units import Unit, Units
from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.card import Card
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.errors import ConfigError
from unperturb.models.networks.classifier import Architecture, ImageClassifier
from unperturb.models.purifiers.base import NoPurifier, Purifier

PLAN = Plan(threat=Threat(norm="linf", epsilon=8 / 255), budget=BUDGETS["fast"], attacks=NAMES)


def as_checkpoint(classifier: ImageClassifier) -> Checkpoint:
    classes = tuple(str(number) for number in range(classifier.num_classes))
    architecture = Architecture(name="test", num_classes=len(classes))
    return Checkpoint(Card(id="test", architecture=architecture, classes=classes, data={}, training={}), classifier)


def evaluate(
    classifier: ImageClassifier,
    make: Callable[[ImageClassifier], Purifier],
    data: EvaluationSet,
    folder: Path,
    plan: Plan = PLAN,
) -> dict[str, Any]:
    subject = ready(as_checkpoint(classifier), torch.device("cpu"))
    return pair(subject, make(subject.classifier), data, plan, folder).run()


def pair(subject: Checkpoint, purifier: Any, data: EvaluationSet, plan: Plan, folder: Path) -> Evaluation:
    bare = Evaluation(defense_of("none", subject), data, plan, folder=folder)
    return Evaluation(defense_of(purifier, subject), data, plan, folder=folder, bare=bare)


def alone(found: dict[str, Any]) -> dict[str, float]:
    cells = {name: cell["alone"] for name, cell in found["figures"]["attacks"].items()}
    return {name: cell["accuracy"] for name, cell in cells.items() if cell}


@pytest.fixture(scope="module")
def gratings_net() -> ImageClassifier:
    return broken_defenses.natural_classifier()


def test_rounding_to_3_bits_withstands_transfer_and_is_broken(tmp_path: Path) -> None:
    classifier = FineAndCoarse()
    found = evaluate(classifier, Rounding, classifier.images(48), tmp_path)
    figures = found["figures"]
    assert figures["bare"]["worst_case"]["accuracy"] < 0.05
    assert alone(found)["transfer"] > 0.4
    assert figures["worst_case"]["accuracy"] < 0.05
    assert alone(found)["apgd-ce"] > 0.9  # its own gradient is zero: that is the sign of masking
    assert any("full gradient does not" in warning for warning in figures["signs"]["warnings"])
    assert found["flags"]["zero_gradients"] == found["flags"]["of_images"]
    assert not found["flags"]["optimisation_loop"]


def test_random_resizing_withstands_transfer_and_is_broken(gratings_net: ImageClassifier, tmp_path: Path) -> None:
    found = evaluate(gratings_net, RandomResizing, broken_defenses.evaluation_set(48), tmp_path)
    assert alone(found)["transfer"] > 0.4
    assert found["figures"]["worst_case"]["accuracy"] < 0.05
    assert found["flags"]["randomised"]
    assert found["figures"]["resubmitted"]["draws"] == 10


def test_replayed_table_of_known_points_withstands_transfer_and_is_broken(
    gratings_net: ImageClassifier, tmp_path: Path
) -> None:
    data = broken_defenses.evaluation_set(32)
    bare = Evaluation(
        defense_of("none", ready(as_checkpoint(gratings_net), torch.device("cpu"))), data, PLAN, folder=tmp_path
    )
    known = bare.chunk(torch.arange(32), lambda _: None)["autoattack"].points
    found = evaluate(gratings_net, lambda classifier: Replay(classifier, known, data.images), data, tmp_path)
    assert alone(found)["transfer"] > 0.9
    assert found["figures"]["worst_case"]["accuracy"] < 0.05


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "timings"}


QUICK = replace(
    PLAN,
    chunk=4,
    attacks=("autoattack", "noise", "apgd-ce", "transfer", "bpda-apgd-ce", "batchmate", "defended-autoattack"),
    budget=replace(
        BUDGETS["fast"], apgd_steps=3, mate_steps=1, mates=1, autoattack_steps=2, autoattack_queries=5, targets=1
    ),
)


def tiny_evaluation(
    folder: Path, images: Tensor, plan: Plan = QUICK, spec: str = "reverse-attack:transfer,steps=2,vote=none"
) -> Evaluation:
    subject = ready(make_checkpoint(), torch.device("cpu"))
    data = EvaluationSet(images, torch.arange(len(images)) % 3, "generated", "eight")
    bare = Evaluation(defense_of("none", subject), data, plan, folder=folder)
    return bare if spec == "none" else Evaluation(defense_of(spec, subject), data, plan, folder=folder, bare=bare)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of the tiny evaluation, whole and in one go."""
    return tiny_evaluation(tmp_path_factory.mktemp("undisturbed"), make_images()).run()


def test_run_that_is_stopped_every_few_units_ends_with_the_same_record(
    undisturbed: dict[str, Any], images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def stop_after_a_few(
        self: Units, name: str, chunk: int, identity: dict[str, Any], compute: Callable[[], Unit]
    ) -> Unit:
        def once() -> Unit:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return compute()

        return get(self, name, chunk, identity, once)

    get = Units.get
    monkeypatch.setattr(Units, "get", stop_after_a_few)
    for start in range(60):
        left = 1 if start == 0 else 4
        try:
            resumed = tiny_evaluation(tmp_path, images).run()
            break
        except KeyboardInterrupt:
            continue
    assert json.dumps(comparable(resumed)) == json.dumps(comparable(undisturbed))


def test_shards_merge_to_the_whole(undisturbed: dict[str, Any], images: Tensor, tmp_path: Path) -> None:
    parts = [tiny_evaluation(tmp_path, images, replace(QUICK, shard=(number, 2))).run() for number in (1, 0)]
    merged = merge(parts)
    for key in ("indices", "outcomes", "bare_outcomes", "resubmitted", "figures", "purifier"):
        assert merged[key] == undisturbed[key], key
    with pytest.raises(ValueError, match="missing"):
        merge(parts[:1])
    with pytest.raises(ValueError, match="budget"):
        merge([parts[0], {**parts[1], "budget": {"name": "full"}}])


def test_only_attacks_that_do_not_apply_leave_the_clean_accuracy(images: Tensor, tmp_path: Path) -> None:
    found = tiny_evaluation(tmp_path, images, replace(QUICK, attacks=("intermediate",)), "none").run()
    assert list(found["outcomes"]) == ["clean"]
    found = tiny_evaluation(tmp_path, images, replace(QUICK, attacks=("intermediate",)), "restorer").run()
    assert list(found["outcomes"]) == ["clean"]
    assert "no steps" in found["could_not_run"]["intermediate"]


def test_chunk_without_an_image_that_is_right_is_not_attacked(images: Tensor, tmp_path: Path) -> None:
    subject = ready(make_checkpoint(), torch.device("cpu"))
    wrong = (subject.classifier(images).argmax(1) + 1) % 3
    data, plan = EvaluationSet(images, wrong, "generated", "wrong"), replace(QUICK, attacks=NAMES)
    found = pair(subject, NoPurifier(subject.classifier), data, plan, tmp_path).run()
    assert found["figures"]["worst_case"]["accuracy"] == 0
    assert all(cell["attacked"] == 0 for name, cell in found["figures"]["attacks"].items() if name != "clean")


def test_an_image_that_is_broken_is_not_attacked_again_and_the_parts_of_autoattack_add_up(
    images: Tensor, tmp_path: Path
) -> None:
    found = tiny_evaluation(tmp_path, images, replace(QUICK, threat=Threat(norm="linf", epsilon=32 / 255))).run()
    outcomes = list(found["outcomes"].items())
    broken = [0 in (values[image] for _, values in outcomes) for image in range(8)]
    assert any(broken)
    for image in range(8):
        after = [
            values[image] for name, values in outcomes if name in ("bpda-apgd-ce", "batchmate", "defended-autoattack")
        ]
        assert 0 not in after or set(after[after.index(0) + 1 :]) <= {None}
    parts = found["autoattack_parts"]
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    whole = [min((v for v in column if v is not None), default=None) for column in zip(*parts.values(), strict=True)]
    assert whole == found["outcomes"]["defended-autoattack"]


def test_what_the_bare_classifier_withstands_at_larger_radii_stands_beside_the_defenses(
    undisturbed: dict[str, Any], images: Tensor, tmp_path: Path
) -> None:
    assert undisturbed["larger_epsilon"].keys() == {"2", "4"}
    bare = tiny_evaluation(tmp_path, images, spec="none").run()
    assert undisturbed["bare_larger_epsilon"] == bare["larger_epsilon"]
    assert bare["bare_larger_epsilon"] is None


def test_squares_breaks_of_the_bare_classifier_are_queries(images: Tensor, tmp_path: Path) -> None:
    plan = replace(QUICK, attacks=("autoattack",))
    found = tiny_evaluation(tmp_path, images, plan, "none").run()
    parts = found["autoattack_parts"]
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    whole = [min((v for v in column if v is not None), default=None) for column in zip(*parts.values(), strict=True)]
    assert whole == found["outcomes"]["autoattack"]
    outcomes: Outcomes = {"clean": of(100), "autoattack": of(40), "apgd-ce": of(50)}
    signs = figures(outcomes, by_part={"apgd-ce": of(50), "square": of(40)})["signs"]
    assert signs["queries_beyond_gradient"] == {"broken": 10, "n": 100}
    unknown = figures({**outcomes, "rays": of(40)})["signs"]  # of a record without the parts
    assert unknown["queries_beyond_gradient"] == {"broken": 0, "n": 100}


def test_empty_shard_is_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard 3/3"):
        tiny_evaluation(tmp_path, images, replace(QUICK, shard=(2, 3)))


def figures(
    outcomes: Outcomes,
    *,
    bare: Outcomes | None = None,
    resubmitted: list[list[int]] | None = None,
    larger: Outcomes | None = None,
    by_part: Outcomes | None = None,
) -> dict[str, Any]:
    return summarise(outcomes, bare=bare, resubmitted=resubmitted, larger=larger or {}, by_part=by_part or {})


def test_worst_case_is_paired_with_the_bare_classifiers_on_the_same_images() -> None:
    outcomes: Outcomes = {"clean": [1, 1, 1, 0], "transfer": [1, 1, 0, None], "rays": [1, 0, None, None]}
    bare: Outcomes = {"clean": [1, 1, 1, 1], "autoattack": [0, 0, 1, 1]}
    found = figures(outcomes, bare=bare, resubmitted=[[1, 1, 0, 0], [1, 0, 0, 0]])
    assert found["worst_case"]["accuracy"] == 0.25
    assert found["bare"]["worst_case"]["accuracy"] == 0.5
    assert found["gain"]["mean"] == -0.25
    assert found["gain"] == gain([True, False, False, False], [False, False, True, True])
    assert found["weaker"] == [NO_AUTOATTACK]
    assert found["clean_gain"]["mean"] == -0.25
    assert [found["attacks"][name]["left"]["accuracy"] for name in outcomes] == [0.75, 0.5, 0.25]
    assert found["attacks"]["rays"] == {"attacked": 2, "broken": 1, "left": found["worst_case"], "alone": None}
    assert found["resubmitted"]["mean"] == 3 / 8
    assert found["resubmitted"]["worst_of_draws"]["accuracy"] == 0.25


def test_interval_of_a_gain_stays_within_what_a_gain_can_be() -> None:
    sure: Outcomes = {"clean": [1] * 10, "defended-autoattack": [1] * 10}
    lost: Outcomes = {"clean": [1] * 10, "autoattack": [0] * 10}
    low, high = figures(sure, bare=lost)["gain"]["interval"]
    assert 0.5 < low < high == 1.0


def test_gain_is_known_to_be_whole_where_autoattack_met_both() -> None:
    clean: list[int | None] = [1, 1]
    neither = figures({"clean": clean, "apgd-ce": [1, 0]}, bare={"clean": clean, "apgd-ce": [0, 0]})
    assert neither["weaker"] == [NO_JUDGE]
    both: Outcomes = {"clean": clean, "defended-autoattack": [1, 0]}
    assert not figures(both, bare={"clean": clean, "autoattack": [0, 0]})["weaker"]
    cut = summarise(both, bare=both, resubmitted=None, larger={}, by_part={}, weaker=["the gradient is cut"])
    assert cut["weaker"] == ["the gradient is cut"]


def of(right: int, n: int = 100) -> list[int | None]:
    return [int(image < right) for image in range(n)]


@pytest.mark.parametrize(
    ("outcomes", "larger", "by_part", "says"),
    [
        ({"apgd-ce": of(50), "apgd-ce-twice": of(49)}, {"2": of(9), "4": of(1)}, {}, None),
        (
            {"apgd-ce": of(50), "apgd-ce-twice": of(45)},
            {},
            {},
            "twice the iterations lower apgd-ce by another 5.0 points",
        ),
        ({"apgd-ce": of(50)}, {"2": of(30), "4": of(20)}, {}, "20.0% withstand 4 times the epsilon"),
        ({"apgd-ce": of(50), "transfer": of(45)}, {}, {}, "transferred images break 5 of 100"),
        ({"apgd-ce": of(50), "transfer": of(49)}, {}, {}, "transferred images break 1 of 100"),
        ({"apgd-ce": of(50)}, {}, {"fab-t": of(50), "square": of(40)}, "queries alone break 10 of 100"),
        ({"apgd-ce": of(50)}, {}, {"fab-t": of(50), "square": of(49)}, "queries alone break 1 of 100"),
    ],
    ids=["none", "not converged", "epsilon", "transfer", "transfer of one", "queries", "queries of one"],
)
def test_signs_of_masked_gradients_are_told(outcomes: Outcomes, larger: Outcomes, by_part: Outcomes, says: str) -> None:
    signs = figures({"clean": of(100), **outcomes}, larger=larger, by_part=by_part)["signs"]
    assert [warning for warning in signs["warnings"] if says is None or says not in warning] == []
    assert len(signs["warnings"]) == (0 if says is None else 1)


def test_reverse_attack_trips_the_flags_of_a_loop_and_of_randomness(
    undisturbed: dict[str, Any], images: Tensor, tmp_path: Path
) -> None:
    flags = undisturbed["flags"]
    assert flags["optimisation_loop"]
    assert flags["randomised"]
    assert flags["zero_gradients"] == flags["of_images"]
    flags = tiny_evaluation(tmp_path, images, spec="none").run()["flags"]
    assert flags == {"randomised": False, "zero_gradients": 0, "of_images": 4, "optimisation_loop": False}


def test_restorer_without_steps_is_flagged_by_the_gradient_that_the_attacks_use(images: Tensor, tmp_path: Path) -> None:
    flags = tiny_evaluation(tmp_path, images, spec="restorer").run()["flags"]
    assert flags == {"randomised": False, "zero_gradients": 0, "of_images": 4, "optimisation_loop": False}


def test_passes_are_counted_per_image(undisturbed: dict[str, Any]) -> None:
    # the restored view, 2 steps of 2 views and the answer; only the views are differentiated
    assert undisturbed["passes_per_image"]["clean"] == {"forward": 6.0, "backward": 4.0}


class NotANumber(ImageClassifier):
    def __init__(self) -> None:
        super().__init__(feature_dim=1, num_classes=3, image_size=32)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1]

    def logits(self, features: Tensor) -> Tensor:
        return torch.full((len(features), 3), float("nan"))


def test_classifier_that_returns_nan_is_refused_before_any_attack(images: Tensor, tmp_path: Path) -> None:
    data = EvaluationSet(images, torch.zeros(8, dtype=torch.long), "generated", "eight")
    subject = ready(as_checkpoint(NotANumber()), torch.device("cpu"))
    with pytest.raises(ConfigError, match="NaN"):
        Evaluation(defense_of("none", subject), data, PLAN, folder=tmp_path)


@pytest.mark.parametrize(
    ("n", "seeds", "tolerance", "queries"),
    [(48, 1, 0.05, 500), pytest.param(256, 3, 0.01, 5000, marks=pytest.mark.slow)],
)
def test_apgd_is_as_strong_as_the_reference_implementation(
    gratings_net: ImageClassifier, tmp_path: Path, n: int, seeds: int, tolerance: float, queries: int
) -> None:
    from pyautoattack.autopgd_base import APGDAttack

    data = broken_defenses.evaluation_set(n)
    threat = Threat(norm="linf", epsilon=6 / 255)
    plan = replace(
        PLAN,
        threat=threat,
        chunk=n,
        attacks=("apgd-ce", "apgd-t", "square"),
        budget=replace(BUDGETS["fast"], apgd_steps=50, targets=3, square_queries=200),
    )
    found = evaluate(gratings_net, NoPurifier, data, tmp_path, plan)
    standard = replace(plan, attacks=("autoattack",), budget=replace(BUDGETS["standard"], autoattack_queries=queries))
    reference = evaluate(gratings_net, NoPurifier, data, tmp_path, standard)
    ours, theirs = [], []
    for seed in range(seeds):  # one random start is worth a point by itself
        attack = APGDAttack(
            gratings_net,
            n_iter=50,
            n_restarts=1,
            eps=threat.epsilon,
            norm="Linf",
            seed=seed,
            device="cpu",
            eot_iter=1,
            rho=0.75,
        )
        points = attack.perturb(data.images, data.labels)
        theirs.append(float(gratings_net(points).argmax(1).eq(data.labels).float().mean()))
        again = replace(plan, seed=seed, attacks=("apgd-ce",))
        ours.append(alone(evaluate(gratings_net, NoPurifier, data, tmp_path, again))["apgd-ce"])
    assert 0.05 < sum(theirs) / seeds < 0.95
    assert abs(sum(ours) - sum(theirs)) / seeds <= tolerance
    own, standard_figure = (run["figures"]["worst_case"]["accuracy"] for run in (found, reference))
    assert own <= standard_figure + tolerance


def test_budget_says_of_what_it_has_less() -> None:
    standard = BUDGETS["standard"]
    assert "apgd_steps" in BUDGETS["fast"].less_than(standard)
    assert BUDGETS["full"].less_than(standard) == []
    assert replace(standard, targets=3, lambdas=(1.0,)).less_than(standard) == ["targets", "lambdas"]


FORMER_DEFAULT = "reverse-attack:transfer,steps=5,step_size=2/255,vote=none"


def test_former_default_of_the_small_checkpoint_is_shown_to_lose() -> None:
    """The fourth broken defense, this project's own: it read +3 points while it was attacked with less than `none`."""
    runs = {run["results"]["purifier_spec"]: run for run in in_main_ball(robustness_runs())}
    run = runs[FORMER_DEFAULT]
    figures = run["results"]["figures"]
    assert run["results"]["budget"]["name"] == "standard"
    assert figures["gain"]["n"] == 1000
    assert figures["gain"]["interval"][1] < 0
    again = summarise(
        run["results"]["outcomes"],
        bare=run["results"]["bare_outcomes"],
        resubmitted=run["results"]["resubmitted"],
        larger=run["results"]["larger_epsilon"],
        by_part=run["results"]["autoattack_parts"],
    )
    assert again.pop("weaker") == [NO_AUTOATTACK]
    assert again == {name: value for name, value in figures.items() if name != "gain_at_most"}  # image by image


@real_images
@pytest.mark.slow
def test_attack_through_the_former_default_breaks_more_than_the_bare_classifier_loses(tmp_path: Path) -> None:
    images, labels = first_test_images("cifar10", 96)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    data = EvaluationSet(x, torch.tensor(labels), "folder", "first")
    plan = replace(PLAN, budget=BUDGETS["standard"], attacks=("apgd-ce",), chunk=48)
    subject = ready(store.load("small"), torch.device("cpu"))
    figures = pair(subject, FORMER_DEFAULT, data, plan, tmp_path).run()["figures"]
    assert figures["gain"]["interval"][1] < 0
