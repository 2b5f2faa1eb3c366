"""What a preset is worth before a model, as the answers and the lists say it."""

import dataclasses
from pathlib import Path

import pytest

from tests.conftest import make_checkpoint
from tests.support.serving import photo, serving
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.parameters import parameters
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.http.worth import PURPOSES, advice_of, worth_of


def test_answer_says_what_the_preset_is_worth_before_this_model(tmp_path: Path) -> None:
    loaded = make_checkpoint()
    gains = {"gain": -0.02, "gain_interval": [-0.04, 0.0], "clean_gain": None, "clean_gain_interval": None}
    vote = gains | {"gain_at_most": True, "transfer_gain": None, "parameters": parameters(PRESETS["vote"])}
    changed = vote | {"parameters": parameters(PRESETS["transfer"])}
    card = store.save(tmp_path, loaded)
    presets = {"vote": vote, "published": changed}
    found = {"n": 300, "epsilon": 8 / 255, "budget": "fast", "presets": presets, "verdict": "use `vote`"}
    found["weights_sha256"] = card.weights_sha256
    store.write_card(tmp_path, dataclasses.replace(card, figures={**card.figures, "assessment": found}))
    with serving(tmp_path) as client:
        worths = [
            client.post(f"/classify?preset={preset}", files={"image": photo()}).json()["purification"]["worth"]
            for preset in ("vote", "default", "published")
        ]
        said = client.post("/classify?preset=vote", files={"image": photo()}).json()["purification"]["purpose"]
        shown = client.get("/model").json()
    knows = {"mean": -0.02, "interval": [-0.04, 0.0], "at_most": True}
    expected = {
        "n": 300,
        "epsilon": 8 / 255,
        "budget": "fast",
        "knows_everything": knows,
        "does_not_know": None,
        "clean": None,
    }
    assert worths == [expected, None, None]
    assert shown["worth"] == {"vote": expected}
    assert shown["advice"] == "use `vote`"
    assert said == PURPOSES["vote"]
    assert set(PURPOSES) == set(PRESETS)


@pytest.mark.parametrize("found", [None, {}, {"n": 3, "presets": None}, {"presets": {"vote": {}}}, "old"])
def test_card_with_an_assessment_of_another_form_says_nothing(found: object) -> None:
    card = dataclasses.replace(make_checkpoint().card, figures={"assessment": found})
    assert worth_of(card, "vote") is None
    assert advice_of(card) is None
