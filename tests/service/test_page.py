"""The web page, in a headless Chromium against the running app."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.support import serving
from tests.support.browser import assert_readable, needs_chromium
from tests.support.page import (
    answer_with_label,
    assert_amplified_difference,
    bare,
    card,
    carded,
    listed,
    photo,
    pixels_of,
    press_run,
    shown,
    use_sample,
)
from unperturb.benchmarks.purifier.samples import ASSETS, SHOWN
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.parameters import parameters
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.models.purifiers.vote import Vote
from unperturb.service.engine.stages import ATTACK_LOOP
from unperturb.service.http.app import create_app
from unperturb.service.http.worth import PURPOSES
from unperturb.service.keys import digest
from unperturb.service.settings import Settings

KEY = "the-key-of-the-tests"
UNASSESSED = 'Not assessed yet; "unperturb assess" does it.'

expect.set_options(timeout=20_000)  # a page shares the machine's cores with the service
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    """Of the app, which asks for no key but refuses an unknown one."""
    keys = {"tester": digest(KEY)}
    settings = Settings(
        checkpoint=str(tiny_folder),
        device="cpu",
        threads=1,
        max_batch=1,
        decoders=1,
        api_keys=keys,
        authentication="off",
    )
    with serving.in_thread(create_app(settings)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page in a context of its own; afterwards no request has left its origin, and no script has failed."""
    context = browser.new_context(**{"reduced_motion": "reduce", **getattr(request, "param", {})})
    asked: list[str] = []
    faults: list[str] = []
    context.on("request", lambda sent: asked.append(sent.url.removeprefix("blob:")))
    opened = context.new_page()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    answer = opened.goto(address)
    assert answer is not None
    assert "default-src 'none'" in answer.headers["content-security-policy"]  # whose violations would be faults
    yield opened
    context.close()
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert faults == []


def test_attacked_file_is_shown_at_every_point_of_its_way(page: Page) -> None:
    page.locator("#file").set_input_files(photo())
    expect(page.locator("#drop")).to_contain_text("photo.png")
    expect(page.get_by_label("Attack it first")).to_be_checked()
    answer = press_run(page)
    for name in ("original", "attacked", "purified"):
        seen = card(page, name.capitalize())
        np.testing.assert_array_equal(
            shown(page, name.capitalize()), pixels_of(f"data:image/png;base64,{answer[name]['image']}")
        )
        expect(seen.get_by_role("listitem")).to_have_text(
            [f"{p['label']}{p['score']:.1%}" for p in answer[name]["predictions"]]
        )
        width = seen.locator(".bar i").first.evaluate("bar => bar.style.width")
        assert float(width.removesuffix("%")) == round(100 * answer[name]["predictions"][0]["score"], 1)
    assert_amplified_difference(page, "Attacked", "Original")
    assert_amplified_difference(page, "Purified", "Attacked")

    loss = card(page, "InfoNCE loss")
    assert len(answer["losses"]) == PRESETS["default"].loop.steps == 1  # a curve of one point says nothing
    before, after = (f"{answer[name]:.2f}" for name in ("loss_before", "loss_after"))
    expect(loss.get_by_role("listitem")).to_have_text([f"before{before}", f"after{after}"])
    expect(loss).to_contain_text(f"{before} before and {after} after")

    time = card(page, "Time")
    assert list(answer["timings_ms"]) == time.get_by_role("rowheader").all_inner_texts()
    expect(time).to_contain_text(f"{answer['timings_ms']['total']:.1f} ms")
    details = card(page, "Details")
    for fact in ("tiny", "32 \u00d7 32", answer["model"]["digest"][:12], f"{round(answer['linf'] * 255, 1):g}/255"):
        expect(details).to_contain_text(fact)
    labels = [answer[name]["predictions"][0]["label"] for name in ("original", "attacked", "purified")]
    for label in labels:
        expect(page.get_by_role("status")).to_contain_text(label)


def test_sample_without_an_attack_has_one_difference(page: Page) -> None:
    use_sample(page)
    page.get_by_label("Attack it first").uncheck()
    page.get_by_label("Purifier").select_option("published")
    answer = press_run(page)
    assert (answer["preset"], answer["attacked"]) == ("published", None)
    expect(page.get_by_role("heading", level=2)).to_have_text(
        ["Original", "Purified", "Purified minus original", "InfoNCE loss", "Time", "Details"]
    )
    assert_amplified_difference(page, "Purified", "Original")
    loss = card(page, "InfoNCE loss")
    label = loss.get_by_role("img").get_attribute("aria-label")
    assert label is not None
    assert label.endswith(", ".join(f"{value:.2f}" for value in answer["losses"]))
    expect(loss.locator("circle")).to_have_count(PRESETS["published"].loop.steps)
    expect(loss.locator("text")).to_contain_text(["step", "loss before the step"])


@pytest.mark.parametrize(
    ("name", "attacked", "fate"),
    [
        ("Sample: restored", True, "the purifier brings it back"),
        ("Sample: not restored", True, "the purifier does not bring it back"),
        ("Sample: harmed", False, "the purifier alone makes it wrong"),
    ],
)
def test_sample_says_that_it_is_chosen_and_how_often_it_happens(
    page: Page, name: str, attacked: bool, fate: str
) -> None:
    about = page.get_by_role("note")
    expect(about).to_be_hidden()
    page.get_by_label("Purifier").select_option("vote")
    use_sample(page, name)
    model = json.loads((ASSETS / SHOWN).read_text())["model"]
    expect(about).to_contain_text(f"chosen to show this: by the model {model} and the purifier transfer, ")
    expect(about).to_contain_text(fate)
    expect(page.get_by_label("Attack it first")).to_be_checked(checked=attacked)
    expect(page.get_by_label("Purifier")).to_have_value("transfer")
    counts = {"n": 1000, "right": 690, "changed": 300, "restored": 110, "unrestored": 190, "harmed": 5}
    told = {"model": "m", "data": "cifar10", "counts": counts}
    page.route("**/samples.json", lambda route: route.fulfill(json=told))
    use_sample(page, name)
    often = page.locator("#often")
    expect(often).to_have_text(
        "The samples are chosen. Of the first 1000 test images of cifar10, m has 690 right at first; the attack "
        "changes 300 of them, of which 110 are restored and 190 are not; 5 are harmed."
    )
    page.locator("#file").set_input_files(photo())
    expect(about).to_be_hidden()
    page.route("**/samples.json", lambda route: route.fulfill(json={**told, "counts": None}))
    use_sample(page, name)
    expect(often).to_be_hidden()


def test_samples_that_cannot_be_loaded_are_said(page: Page) -> None:
    page.route("**/samples.json", lambda route: route.abort())
    page.get_by_role("button", name="Sample: harmed").click()
    expect(page.get_by_role("status")).to_have_text("The sample could not be loaded.")


def test_keyboard_alone_runs_it(page: Page) -> None:
    # subscribed to before the page is loaded again: Chromium may take a while to heed it, and the key would be lost
    page.on("filechooser", lambda chooser: chooser.set_files(photo()))
    page.reload()
    page.keyboard.press("Tab")
    assert page.locator("#drop").evaluate("drop => getComputedStyle(drop).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#drop")).to_contain_text("photo.png")
    for key in (*["Tab"] * 7, "Enter"):  # three samples, attack, preset, API key, run
        page.keyboard.press(key)
    expect(page.get_by_role("img", name="The attacked image")).to_be_visible()
    expect(page.get_by_role("button", name="Run")).to_be_focused()


def test_dropped_file_of_a_type_unknown_to_the_browser_is_sent_as_a_form(page: Page) -> None:
    transfer = page.evaluate_handle(
        """async (base64) => {
            const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped"));
            return transfer;
        }""",
        base64.b64encode(photo()["buffer"]).decode(),
    )
    page.locator("#drop").dispatch_event("dragover", {"dataTransfer": transfer})
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_contain_text("dropped")
    with page.expect_request("**/inspect?*") as sent:
        press_run(page)
    assert (sent.value.header_value("content-type") or "").startswith("multipart/form-data")


def test_refused_file_and_no_file_are_told_in_words(page: Page) -> None:
    status = page.locator("[aria-live]")
    page.get_by_role("button", name="Run").click()
    expect(status).to_have_text("Choose an image first.")
    page.locator("#file").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"no image"})
    page.get_by_role("button", name="Run").click()
    expect(status).to_contain_text("(415): the bytes are not an image")
    page.locator("#file").set_input_files(photo())
    expect(status).to_have_text("")
    press_run(page)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            {"status": 503, "headers": {"Retry-After": "7"}, "json": {"title": "Busy", "detail": "too many"}},
            "Busy (503): too many. Try again in 7 s.",
        ),
        ({"status": 502, "body": "<html>a proxy's own</html>"}, "The request failed (502)."),
        (None, "the service cannot be reached"),
    ],
    ids=["overloaded", "not JSON", "no network"],
)
def test_failure_is_told_in_words(page: Page, answer: dict[str, Any] | None, words: str) -> None:
    page.route("**/inspect?*", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    use_sample(page)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text(words)
    page.unroute("**/inspect?*")
    press_run(page)


def test_unknown_key_opens_the_field_and_the_right_one_is_kept_for_the_tab(page: Page) -> None:
    use_sample(page)
    key, summary = page.locator("#key"), page.get_by_text("API key", exact=True)
    summary.click()
    key.fill("another")
    summary.click()
    expect(key).to_be_hidden()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text("(401): the API key is not known here")
    expect(key).to_be_focused()
    key.fill(KEY)
    page.reload()
    use_sample(page)
    with page.expect_request("**/inspect?*") as sent:
        press_run(page)
    assert sent.value.header_value("authorization") == f"Bearer {KEY}"
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_answer_for_an_image_that_was_replaced_is_not_shown(page: Page) -> None:
    held: list[Route] = []
    page.route("**/inspect?*", lambda route: held.append(route))  # it answers no request
    page.locator("#file").set_input_files(photo())
    with page.expect_request("**/inspect?*"):
        page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text("purifying")
    expect(page.get_by_role("button", name="Running")).to_have_attribute("aria-disabled", "true")
    with page.expect_event("requestfailed"):
        page.locator("#file").set_input_files(photo(1))
    expect(page.get_by_role("button", name="Run", exact=True)).to_have_attribute("aria-disabled", "false")
    expect(page.get_by_role("status")).to_have_text("")
    expect(page.locator("#result")).to_be_hidden()


@pytest.mark.parametrize("page", [{"viewport": {"width": 375, "height": 700}}], ids=["375 px"], indirect=True)
def test_phone_needs_no_sideways_scrolling(page: Page) -> None:
    use_sample(page)
    press_run(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    expect(page.get_by_role("status")).to_be_in_viewport()
    expect(card(page, "Original")).to_be_in_viewport()


@pytest.mark.parametrize(
    ("page", "dark"),
    [({"color_scheme": "dark"}, True), ({"color_scheme": "light"}, False)],
    ids=["dark", "light"],
    indirect=["page"],
)
def test_colours_follow_the_system_and_can_be_read(page: Page, dark: bool) -> None:
    page.get_by_role("button", name="Run").click()  # an error has a colour of its own
    texts = (
        ("body", "body"),
        ("header p", "body"),
        ("#status", "body"),
        ("footer a", "body"),
        ("#hint", "#drop"),
        ("#run", "#run"),
    )
    assert_readable(page, texts, dark=dark)


@pytest.mark.parametrize("page", [{"viewport": {"width": 320, "height": 700}}], ids=["320 px"], indirect=True)
def test_names_are_whole_on_the_narrowest_phone(page: Page) -> None:
    long = "a class with a name that is longer than any screen of a phone is wide"
    page.route("**/inspect?*", lambda route: answer_with_label(route, long))
    page.locator("#file").set_input_files(photo())
    press_run(page)
    names = page.locator(".bars span")
    expect(names.first).to_have_text(long)
    for name in names.all():
        assert name.evaluate("one => one.scrollWidth <= one.clientWidth && one.scrollHeight <= one.clientHeight + 1")
    assert page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("page", [{"viewport": {"width": 1280, "height": 900}}], ids=["1280 px"], indirect=True)
def test_predictions_are_above_the_fold(page: Page) -> None:
    def five(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        for name in ("original", "attacked", "purified"):
            body[name]["predictions"] = (2 * body[name]["predictions"])[:5]
        route.fulfill(response=answer, json=body)

    counts = dict.fromkeys(("n", "right", "changed", "restored", "unrestored", "harmed"), 1000)
    told = {"model": "cifar10-wrn10-2-linf", "data": "cifar10", "counts": counts}
    page.route("**/samples.json", lambda route: route.fulfill(json=told))
    page.route("**/inspect?*", five)
    use_sample(page)
    press_run(page)
    for name in ("Original", "Attacked", "Purified"):
        assert card(page, name).get_by_role("listitem").count() == 5
        for one in card(page, name).get_by_role("listitem").all():
            expect(one).to_be_in_viewport(ratio=1)


def test_model_says_what_it_knows_and_when_it_is_not_sure(page: Page) -> None:
    expect(page.locator("#knows")).to_have_text(f"This model knows 3 classes: blue, green, red. {UNASSESSED}")
    expect(page.locator("#model")).to_be_hidden()  # there is one
    page.route("**/inspect?*", lambda route: answer_with_label(route, "kiwi"))
    use_sample(page)
    press_run(page)
    expect(page.get_by_role("status")).to_contain_text("The model is not sure: kiwi has 31.0%.")
    expect(card(page, "Original").locator(".legend")).to_have_text("its first class \u2003others")


def test_model_without_a_head_says_what_it_lacks(page: Page) -> None:
    expect(page.locator("#lacks")).to_be_hidden()

    def headless(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=[{**one, "presets": ["vote"]} for one in answer.json()])

    page.route("**/models", headless)
    page.reload()
    expect(page.locator("#lacks")).to_have_text(
        'This model has no head, which default, transfer, published need; "unperturb train head" makes one.'
    )
    expect(page.get_by_label("Purifier")).to_have_value("vote")


def test_purpose_of_the_chosen_preset_stands_below_it_in_the_services_words(page: Page) -> None:
    presets = page.get_by_label("Purifier")
    for preset in ("default", "vote", "transfer", "published"):
        presets.select_option(preset)
        words = PURPOSES[preset]
        expect(page.locator("#purpose")).to_have_text(f"{words[0].upper()}{words[1:]}.")
        expect(presets).to_have_accessible_description(f"{words[0].upper()}{words[1:]}.")
    use_sample(page)
    expect(page.locator("#purpose")).to_contain_text(PURPOSES["transfer"][1:])


def test_what_an_assessment_found_stands_below_the_presets(page: Page, tiny_folder: Path) -> None:
    expect(page.locator("#advice")).to_be_hidden()
    card = store.read_card(tiny_folder)
    default = {
        "parameters": parameters(PRESETS["default"]),
        "gain": -0.031,
        "gain_interval": [-0.05, -0.012],
        "gain_at_most": True,
        "transfer_gain": {"mean": 0.087, "interval": [0.06, 0.114]},
        "clean_gain": None,
        "clean_gain_interval": None,
    }
    assessment = {
        "n": 200,
        "epsilon": 8 / 255,
        "budget": "standard",
        "weights_sha256": card.weights_sha256,
        "presets": {"default": default},
        "verdict": "use `vote`: +3.0 (+1.0 to +5.0) points in the worst case",
    }
    assessed = replace(card, figures={"assessment": assessment})
    page.route("**/models/tiny", lambda route: route.fulfill(json=carded(assessed)))
    page.reload()
    told = "Assessed: use vote: +3.0 (+1.0 to +5.0) points in the worst case."
    gained = "\u2264 -3.1 (to -1.2) against who knows it, +8.7 (+6.0 to +11.4) against who does not"
    judged = "(200 images, attacks of up to 8/255, budget standard)"
    expect(page.locator("#advice")).to_have_text(f"{told} Points gained by default {judged}: {gained}.")
    page.get_by_label("Purifier").select_option("vote")
    expect(page.locator("#advice")).to_have_text(f"{told} Vote was not judged.")
    expect(page.locator("#knows")).to_have_text("This model knows 3 classes: blue, green, red.")


def test_purified_picture_can_be_downloaded(page: Page) -> None:
    use_sample(page)
    answer = press_run(page)
    with page.expect_download() as download:
        card(page, "Purified").get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "purified.png"
    saved = Path(download.value.path()).read_bytes()
    assert saved == base64.b64decode(answer["purified"]["image"])


def test_one_of_several_models_is_chosen_with_the_presets_that_it_has(page: Page, tiny_folder: Path) -> None:
    tiny, other = store.read_card(tiny_folder), bare("bare", "yes", "no")
    page.route("**/models", lambda route: route.fulfill(json=[listed(tiny, default=True), listed(other)]))
    page.route("**/models/bare", lambda route: route.fulfill(json=carded(other)))
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("tiny")
    page.get_by_label("Model").select_option("bare")
    expect(page.locator("#knows")).to_have_text(f"This model knows 2 classes: yes, no. {UNASSESSED}")
    expect(page.get_by_label("Purifier")).to_have_value("vote")
    assert page.get_by_label("Purifier").locator("option:not([disabled])").count() == 1
    use_sample(page)
    with page.expect_request("**/inspect?*") as sent:
        page.get_by_role("button", name="Run").click()
    assert "model=bare" in sent.value.url


def test_late_answer_about_a_model_is_not_shown_with_the_one_chosen_since(page: Page) -> None:
    tiny, late = bare("tiny", "yes", "no"), bare("late", "one", "two", "three")
    waiting: list[Route] = []
    page.route("**/models", lambda route: route.fulfill(json=[listed(tiny, default=True), listed(late)]))
    page.route("**/models/tiny", lambda route: route.fulfill(json=carded(tiny)))
    page.route("**/models/late", lambda route: waiting.append(route))
    page.reload()
    with page.expect_request("**/models/late"):
        page.get_by_label("Model").select_option("late")
    page.get_by_label("Model").select_option("tiny")
    expect(page.locator("#knows")).to_contain_text("yes, no")
    with page.expect_response("**/models/late"):
        waiting[0].fulfill(json=carded(late))
    page.evaluate("new Promise((done) => setTimeout(done))")
    expect(page.locator("#knows")).to_contain_text("yes, no")


def test_page_tells_what_the_service_does(page: Page) -> None:
    def described(steps: int, epsilon: float, *, restores: bool = False) -> str:
        if not steps:
            return "no step, a network of its own" if restores else f"no step, {len(Vote())} views"
        return f"{steps} step{'s' * (steps > 1)}, at most {round(epsilon * 255)}/255"

    options = page.get_by_label("Purifier").locator("option")
    assert [one.get_attribute("value") for one in options.all()] == list(PRESETS)
    presets = [described(one.loop.steps, one.loop.epsilon, restores=one.restores) for one in PRESETS.values()]
    expect(options).to_contain_text(presets)
    expect(page.locator("#attack-hint")).to_contain_text(described(ATTACK_LOOP.steps, ATTACK_LOOP.epsilon))
