"""A headless Chromium, and whether what a page shows can be read."""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@contextmanager
def opened() -> Iterator[Browser]:
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        yield browser


def luminance(page: Page, selector: str, colour: str) -> float:
    """The relative luminance of a colour of the first such element (WCAG 2.2)."""
    found = page.locator(selector).first.evaluate("(one, name) => getComputedStyle(one)[name]", colour)
    channels = np.array([int(part) for part in re.findall(r"\d+", found)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def assert_readable(page: Page, texts: Iterable[tuple[str, str]], *, dark: bool) -> None:
    """The page is dark or light, and each text stands out from what is behind it (WCAG 2.2, 1.4.3)."""
    ground = luminance(page, "body", "backgroundColor")
    assert ground < 0.05 if dark else ground > 0.8
    for selector, behind in texts:
        pair = sorted((luminance(page, selector, "color"), luminance(page, behind, "backgroundColor")))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, selector
