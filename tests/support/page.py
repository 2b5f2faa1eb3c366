"""The web page in a browser: what a visitor does, what is drawn, and what the service is made to say."""

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, Route, expect

from tests.conftest import make_checkpoint
from tests.support import serving
from unperturb.models.checkpoints.card import Card
from unperturb.service.engine.registry import Model
from unperturb.service.http.routes import models
from unperturb.service.http.routes.models import Described


def photo(seed: int = 0) -> FilePayload:
    return {"name": "photo.png", "mimeType": "image/png", "buffer": serving.photo(seed, 48)}


def use_sample(page: Page, name: str = "Sample: restored") -> None:
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#name")).to_have_text(name)  # it is fetched


def press_run(page: Page) -> Any:
    """The service's answer, once the page has drawn it."""
    with page.expect_response("**/inspect?*") as response:
        page.get_by_role("button", name="Run").click()
    expect(page.locator("#result")).to_be_visible()
    return response.value.json()


def card(page: Page, title: str) -> Locator:
    return page.locator("section", has=page.get_by_role("heading", name=title, exact=True))


def pixels_of(url: str | None) -> NDArray[np.int64]:
    """Of a PNG in a data: address."""
    assert url is not None
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(np.int64)


def shown(page: Page, title: str) -> NDArray[np.int64]:
    return pixels_of(card(page, title).get_by_role("img").get_attribute("src"))


def assert_amplified_difference(page: Page, after: str, before: str) -> None:
    change = shown(page, after) - shown(page, before)
    largest = np.abs(change).max()
    difference = card(page, f"{after} minus {before.lower()}")
    drawn = pixels_of(difference.locator("canvas").evaluate("canvas => canvas.toDataURL()"))
    assert np.array_equal(drawn, np.clip(128 + 8 * change, 0, 255))
    expect(difference).to_contain_text("8 times amplified")
    expect(difference).to_contain_text(f"Largest: {largest}/255")


def answer_with_label(route: Route, label: str) -> None:
    answer = route.fetch()
    body = answer.json()
    for name in ("original", "attacked", "purified"):
        for prediction in (body[name] or {"predictions": []})["predictions"]:
            prediction["label"] = label
    body["original"]["predictions"][0]["score"] = 0.31
    route.fulfill(response=answer, json=body)


def carded(card: Card) -> Any:
    """What the service says of a model with this card."""
    return json.loads(bytes(models._card(Model(1, card.id, card.id, card)).body))


def listed(card: Card, *, default: bool = False) -> dict[str, Any]:
    """The model in the service's list."""
    model = Model(1, card.id, card.id, card)
    return Described(
        id=model.id,
        digest=card.weights_sha256,
        classes=len(card.classes),
        image_size=model.image_size,
        presets=model.presets,
        execution=model.execution,
        default=default,
    ).model_dump(mode="json")


def bare(id: str, *classes: str) -> Card:
    """The card of a classifier without a head."""
    return replace(make_checkpoint(head=False).card, id=id, classes=classes)
