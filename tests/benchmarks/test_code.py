"""The digest of the code behind a unit: a unit that other code has stored is not taken for this code's, and a change
elsewhere throws nothing away.
"""

import sys
import threading
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import make_checkpoint
from unperturb.benchmarks.robustness import code
from unperturb.benchmarks.robustness.attacks import ATTACKS
from unperturb.benchmarks.robustness.budgets import BUDGETS
from unperturb.benchmarks.robustness.code import code_digest
from unperturb.benchmarks.robustness.identity import Identity
from unperturb.benchmarks.robustness.subjects import defense_of, ready
from unperturb.models.purifiers.defended import DefendedClassifier

SOURCES = {
    "one.py": "import two\nimport json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import three\n",
    "two.py": "def f():\n    import four\n",
    "three.py": "",
    "four.py": "",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    for name in SOURCES:
        sys.modules.pop(name.removesuffix(".py"), None)
    forget()


def forget() -> None:
    code.modules_behind.cache_clear()
    code._imported_by.cache_clear()
    code._origin.cache_clear()
    code._source.cache_clear()


@pytest.mark.parametrize(
    ("file", "changes"), [("one.py", True), ("two.py", True), ("four.py", True), ("three.py", False)]
)
def test_digest_is_of_a_module_and_of_what_it_imports_when_it_runs(folder: Path, file: str, changes: bool) -> None:
    before = code_digest(["one"])
    (folder / file).write_text(SOURCES[file] + "# changed\n")
    forget()
    assert (code_digest(["one"]) != before) == changes


def test_package_that_something_else_stands_for_is_left_out(folder: Path) -> None:
    before = code_digest(["one"], without=("two",))
    (folder / "two.py").write_text("")
    forget()
    assert code_digest(["one"], without=("two",)) == before


def test_code_without_a_file_is_never_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "notebook_cell", types.ModuleType("notebook_cell"))
    assert code_digest(["notebook_cell"]) != code_digest(["notebook_cell"])


def files(modules: list[str], without: tuple[str, ...] = ()) -> set[str]:
    return {name for module in modules for name in code.modules_behind(module, without)}


def test_attack_and_purifier_depend_on_their_own_code_alone() -> None:
    own = files(["unperturb.models.purifiers.reverse_attack"])
    assert "unperturb.models.attacks.projected_gradient" in own
    assert "unperturb.models.contrastive.loss" in own
    assert "unperturb.models.purifiers.rivals" not in own
    judge = files(["unperturb.benchmarks.robustness.attacks.autoattack"])
    assert not [name for name in judge if ".purifiers" in name]


def unit_identity(defended: DefendedClassifier, attack: str) -> dict[str, object]:
    identity = Identity(defended, None, seed=0)
    return {**identity.of_judge(), **identity.of_attack(attack, ATTACKS[attack], BUDGETS["fast"])}


def test_another_purifier_of_the_same_classifier_leaves_the_bare_row_and_not_its_own() -> None:
    subject = ready(make_checkpoint(), torch.device("cpu"))
    bare = [unit_identity(defense_of("none", subject), "autoattack") for _ in range(2)]
    assert bare[0] == bare[1]
    specs = ("reverse-attack:steps=1", "reverse-attack:steps=2", "vote:shifts=1", "vote:shifts=2", "restorer")
    own = [unit_identity(defense_of(spec, subject), "apgd-ce") for spec in specs]
    assert all(one != other for place, one in enumerate(own) for other in own[:place])


class Holding:
    """Leaves images alone, and holds something."""

    def __init__(self, held: object) -> None:
        self._held = held

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        return x


def test_record_tells_defenses_apart_by_what_is_private_and_what_cannot_be_described_is_unknown() -> None:
    subject = ready(make_checkpoint(), torch.device("cpu"))
    one, same, other, lock = (
        Identity(defense_of(Holding(held), subject), None, seed=0).of_record() for held in (1, 1, 2, threading.Lock())
    )
    assert one == same
    assert one["digests"]["defense"] != other["digests"]["defense"]
    assert lock["digests"] == {**one["digests"], "defense": None}
    assert one["code"] == lock["code"] == {"classifier": one["code"]["classifier"], "defense": one["code"]["defense"]}


@pytest.mark.parametrize(
    ("package", "changes"),
    [("torch", {"autoattack", "apgd-ce", "jpeg"}), ("pyautoattack", {"autoattack"}), ("kornia", {"jpeg"})]
    + [(package, set()) for package in ("imagecorruptions-imaug", "robustbench", "safetensors", "tqdm")],
)
def test_only_a_package_that_is_imported_throws_work_away(
    package: str, changes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kornia")
    subject = ready(make_checkpoint(), torch.device("cpu"))

    def identities() -> dict[str, dict[str, object]]:
        everyday = "unperturb.benchmarks.robustness.everyday"
        bare, jpeg = (defense_of(spec, subject) for spec in ("none", f"{everyday}:JpegMedian"))
        return {
            "autoattack": unit_identity(bare, "autoattack"),
            "apgd-ce": unit_identity(bare, "apgd-ce"),
            "jpeg": unit_identity(jpeg, "apgd-ce"),
        }

    version, before = metadata.version, identities()
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == package else version(name))
    after = identities()
    assert {name for name in before if before[name] != after[name]} == changes


def test_packages_that_ones_own_code_imports_count_and_what_those_import_does_not(
    folder: Path,
) -> None:
    (folder / "two.py").write_text("import PIL.Image\n")
    assert set(code.versions_behind(["one"])) == {"pillow"}
    assert set(code.versions_behind(["torch.nn"])) == {"torch"}


def test_budget_of_another_attack_does_not_count() -> None:
    identity = Identity(defense_of("none", ready(make_checkpoint(), torch.device("cpu"))), None, seed=0)
    fast, standard = (identity.of_attack("rays", ATTACKS["rays"], BUDGETS[name]) for name in ("fast", "standard"))
    assert fast["budget"] == {"rays_queries": 40}
    assert standard["budget"] == {"rays_queries": 1000}
