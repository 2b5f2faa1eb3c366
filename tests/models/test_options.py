"""What `--help` shows of a dataclass of options, and what is read of the command line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from unperturb.models.options import option, parse


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Do something."""

    source: str = option("what to read", positional=True)
    epsilon: float = option("radius", 8 / 255)
    rate: float = option("rate", 0.001)
    share: float = option("share", 0.2)
    count: int = option("how many", 200)
    names: tuple[str, ...] = option("names", ())
    sizes: tuple[str, ...] = option("sizes", ("1", "8"))
    model: str = option("what is run", "small", also=("--network",))
    cache: Path | None = option("folder", None)


def helped(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(Chosen, ["--help"], program="it")
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "line",
    [
        "--epsilon EPSILON radius (default: 8/255) --",
        "--rate RATE rate (default: 0.001) --",
        "--share SHARE share (default: 0.2) --",  # 51/255 is nobody's way to say it
        "--count COUNT how many (default: 200) --",
        "--names NAMES names --",
        "--sizes SIZES sizes (default: 1 8) --",
        "--model MODEL, --network MODEL what is run (default: small) --",
        "positional arguments: SOURCE what to read options:",
    ],
)
def test_help_shows_a_default_as_it_is_typed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in helped(capsys)


def test_help_says_nothing_of_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    said = helped(capsys)
    assert said.endswith("--cache CACHE folder")
    assert "usage: it [-h] [--epsilon EPSILON]" in said


def test_positional_may_stand_anywhere_and_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["photos", "--epsilon", "4/255"], ["--epsilon", "4/255", "photos"]):
        found = parse(Chosen, given, program="it")
        assert (found.source, found.epsilon, found.sizes) == ("photos", 4 / 255, ("1", "8"))
    with pytest.raises(SystemExit):
        parse(Chosen, [], program="it")
    assert "required: SOURCE" in capsys.readouterr().err


def test_other_name_of_an_option_is_the_same_option() -> None:
    for name in ("--model", "--network"):
        assert parse(Chosen, ["photos", name, "large"], program="it").model == "large"
    assert parse(Chosen, ["photos"], program="it").model == "small"


@pytest.mark.parametrize("text", ["1e400", "1/0", "much"])
def test_number_that_is_none_is_refused_as_it_was_given(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Chosen, ["photos", "--epsilon", text], program="it")
    assert f"argument --epsilon: {text!r} is neither a number nor a fraction" in capsys.readouterr().err
