from pathlib import Path

import pytest

from unperturb.models.cache import cache_folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UNPERTURB_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a/images")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/unperturb/images")),
        ({"UNPERTURB_CACHE": "", "XDG_CACHE_HOME": ""}, Path("/home/c/.cache/unperturb/images")),
        ({}, Path("/home/c/.cache/unperturb/images")),
    ],
    ids=["UNPERTURB_CACHE", "XDG_CACHE_HOME", "both empty", "neither"],
)
def test_cache_folder_follows_the_first_variable_that_is_set(
    variables: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UNPERTURB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/c")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("images") == expected
