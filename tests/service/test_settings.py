"""Settings: refused by name, chosen by what the machine has, read from the environment."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.support.engines import ThreadHandle
from tests.support.serving import settings
from unperturb.service.http.app import create_app
from unperturb.service.settings import Settings


@pytest.mark.parametrize(
    "bad",
    [{"preset": "best"}, {"device": "tpu:zero"}, {"device": "cpu,cuda:99"}, {"max_queue": 0}, {"surprise": 1}],
    ids=str,
)
def test_setting_out_of_range_is_refused_by_name(bad: dict[str, object], tiny_folder: Path) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        settings(tiny_folder, **bad)


def test_compiled_steps_without_a_compiler_are_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValidationError, match="no-such-compiler"):
        settings(tiny_folder, execution="compiled")


@pytest.mark.parametrize(
    ("compiler", "asked", "first", "later"),
    [
        ("true", "auto", "eager", "compiled"),
        ("no-such-compiler", "auto", "eager", None),
        ("true", "eager", "eager", None),
        ("true", "captured", "captured", None),
    ],
)
def test_execution_is_chosen_by_what_the_machine_has(
    compiler: str, asked: str, first: str, later: str | None, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    chosen = settings(tiny_folder, execution=asked)
    assert (chosen.first_execution, chosen.upgrade(torch.device("cpu"))) == (first, later)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_MAX_BODY_BYTES", "123")
    assert Settings().max_body_bytes == 123


def test_name_that_is_no_setting_is_told_in_the_log(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UNPERTURB_PRESETT", "vote")
    monkeypatch.setenv("UNPERTURB_CACHE", str(tiny_folder))  # another part's
    monkeypatch.setenv("UNPERTURB_MAX_IMAGES", "7")
    with caplog.at_level("WARNING", logger="unperturb.service"):
        create_app(settings(tiny_folder), handle=ThreadHandle)
    assert [record.getMessage() for record in caplog.records if record.name == "unperturb.service"] == [
        "no such setting, and not heeded: UNPERTURB_PRESETT"
    ]
