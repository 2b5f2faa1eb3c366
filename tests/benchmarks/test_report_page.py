"""The report's page, in a headless Chromium from its file."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import assert_readable, needs_chromium
from tests.support.records import NO_SIGNS, in_order, record
from unperturb.benchmarks.reporting.report import Report
from unperturb.benchmarks.reporting.rows import published_rows

pytestmark = needs_chromium

N = 20
BARE = in_order({"clean": 4, "apgd-ce": 5, "autoattack": 1}, N)
KNOWN = in_order({"clean": 4, "apgd-ce": 3, "transfer": 1, "intermediate": 8}, N)
PUBLISHED = len(published_rows(("cifar10", "Linf", 8 / 255)))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a report with everything that makes a row wide: long names, draws, signs, panels."""
    draws = [[1] * 4 + [0] * 16] * 3
    signs = {**NO_SIGNS, "warnings": ["twice the iterations break 6 images more, of 30 that withstood the budget's"]}
    purifier = "reverse-attack:steps=40,step_size=1/255,views=8,temperature=1/5"
    known = record(KNOWN, BARE, purifier=purifier, signs=signs, resubmitted=draws, panel=2, ms=1234.5)
    runs = [record(BARE, model="cifar10-wrn10-2-linf"), {**known}, record(KNOWN, BARE, purifier="hedge")]
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(Report(runs).to_html())
    return file.as_uri()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def page(browser: Browser, address: str, scheme: str) -> Iterator[Page]:
    """The page in a window of 1,280 pixels; afterwards no script has failed."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    faults: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(address)
    yield opened
    context.close()
    assert faults == []


def test_table_fits_the_window_with_the_source_in_sight(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    source = page.locator("table.figures").first.locator("td", has_text="measured").first
    expect(source).to_be_in_viewport(ratio=1)
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    page.get_by_role("button", name="Show all").click()
    for box in page.locator(".scroll").all():
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0


def test_button_shows_all_published_rows_and_the_nearest_again(page: Page) -> None:
    rows = page.locator("tbody.published")
    expect(rows.locator("visible=true").locator("tr")).to_have_count(10)
    button = page.get_by_role("button", name=f"Show all {PUBLISHED} published rows")
    expect(button).to_have_attribute("aria-expanded", "false")
    button.click()
    expect(rows.locator("visible=true").locator("tr")).to_have_count(PUBLISHED)
    page.get_by_role("button", name="Show the nearest 10 published rows").click()
    expect(rows.locator("visible=true").locator("tr")).to_have_count(10)


def test_rows_are_sorted_by_the_head_that_is_pressed_with_their_remarks(page: Page) -> None:
    page.get_by_role("button", name="worst case, % (95%)", exact=True).click()
    shown = page.locator("table.figures tbody").locator("visible=true")
    keys = shown.locator("tr:first-child td:nth-child(4)").evaluate_all("cells => cells.map(cell => +cell.dataset.key)")
    assert len(keys) >= 13
    assert keys == sorted(keys, reverse=True)
    page.get_by_role("button", name="worst case, % (95%)", exact=True).click()
    first = page.locator("table.figures tbody").locator("visible=true").first
    assert float(first.locator("td:nth-child(4)").first.get_attribute("data-key") or "") == 0.2
    body = page.locator("tbody", has_text="temperature")
    expect(body.locator(".remarks")).to_contain_text("gradients may be masked: twice the iterations")


def test_colours_follow_the_system_and_can_be_read(page: Page, scheme: str) -> None:
    texts = (
        ("body", "body"),
        ("header p", "body"),
        (".below p", "body"),
        (".notes dd", "body"),
        (".figures th button", ".scroll"),
        (".published td", ".scroll"),
        (".measured td", ".measured tr"),
        (".measured td small", ".measured tr"),
        (".remarks li", ".remarks ul"),
        (".panel .wrong", ".scroll"),
        (".panel .right", ".scroll"),
    )
    assert_readable(page, texts, dark=scheme == "dark")


def test_plots_are_those_of_the_scheme(page: Page, scheme: str) -> None:
    """The corner of the first plot has the ground of the cards."""
    corner = page.locator("img.plot").first.evaluate(
        """(image) => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 1;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        }"""
    )
    card = page.locator(".scroll").first.evaluate("one => getComputedStyle(one).backgroundColor")
    assert corner == [int(part) for part in re.findall(r"\d+", card)[:3]]
