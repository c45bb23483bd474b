"""A Request takes what is right and answers what is wrong with a sentence."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pydantic
import pytest

from mezzotint.errors import RequestError
from mezzotint.request import MAX_PROMPT, MAX_SEED, Request

FULL: dict[str, Any] = {
    "prompt": "a lemon, 柠檬 🍋",
    "negative_prompt": "",
    "width": 104,
    "height": 72,
    "steps": 20,
    "guidance_scale": 7.5,
    "sampler": "euler_a",
    "spacing": "karras",
    "seed": MAX_SEED - 2,
    "count": 3,
    "batch": 2,
    "clip_skip": 1,
    "eta": 0.5,
    "guidance_rescale": 0.7,
    "guidance_interval": (0.3, 5.0),
    "original_size": (1000, 801),
    "crop": (0, 3),
    "target_size": (1024, 1024),
}


def test_a_full_request_survives_json() -> None:
    request = Request(**FULL)
    assert set(FULL) == set(Request.model_fields)
    assert request.model_dump() == FULL
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert hash(request) == hash(Request(**FULL))


def test_none_is_the_models_own() -> None:
    request = Request(prompt="")
    assert request.count == 1
    assert {value for name, value in request if name not in ("prompt", "count")} == {None}


def test_every_field_says_what_is_right() -> None:
    assert all(field.description for field in Request.model_fields.values())


def test_replace_validates_and_leaves_the_first_alone() -> None:
    request = Request(**FULL)
    assert request.replace(seed=1).seed == 1
    assert request.seed == FULL["seed"]
    with pytest.raises(RequestError, match="steps is 0"):
        request.replace(steps=0)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        request.steps = 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 3),
        ("prompt", "x" * (MAX_PROMPT + 1)),
        ("prompt", "\udcff"),
        ("negative_prompt", "x" * (MAX_PROMPT + 1)),
        ("width", 100),
        ("width", 0),
        ("height", -8),
        ("height", 8200),
        ("steps", 0),
        ("steps", 10_000),
        ("steps", 2.5),
        ("steps", True),
        ("steps", "many"),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -1),
        ("guidance_scale", 1e308),
        ("sampler", ""),
        ("sampler", 7),
        ("spacing", "k" * 101),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        pytest.param("seed", 10**5000, id="seed-too-long-to-print"),
        ("count", 0),
        ("count", None),
        ("batch", 0),
        ("clip_skip", -1),
        ("eta", float("nan")),
        ("eta", 1.5),
        ("guidance_rescale", 2),
        ("guidance_interval", (5.0, 0.3)),
        ("guidance_interval", (1.0, 1.0)),
        ("guidance_interval", (0.1, float("inf"))),
        ("guidance_interval", (0.1,)),
        ("original_size", (0, 10)),
        ("crop", (-1, 0)),
        ("crop", "middle"),
        ("target_size", 512),
    ],
)
def test_a_wrong_field_gets_a_sentence(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Request.model_validate({"prompt": "a lemon", field: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{field} is ")
    assert sentence.endswith(f"it must be {Request.model_fields[field].description}")
    assert len(sentence) < 400
    assert "\n" not in sentence


def test_the_sentences_in_full() -> None:
    with pytest.raises(RequestError, match=r"^prompt is missing; it must be a text"):
        Request()  # type: ignore[call-arg]
    with pytest.raises(RequestError) as caught:
        Request(prompt="x" * 10_000_000, steps=0)
    assert str(caught.value) == (
        "prompt is 10,000,000 characters long; it must be a text (valid Unicode) of at most 100,000 characters. "
        "steps is 0; it must be a whole number from 1 to 1000"
    )


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="no field 'negative'; the nearest is negative_prompt"):
        Request(prompt="", negative="dark")  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="no field 'zzz'; it has prompt, negative_prompt"):
        Request(prompt="", zzz=1)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="no field 1; "):
        Request.model_validate({"prompt": "", 1: 2})


def test_the_last_seed_must_fit() -> None:
    assert Request(prompt="", seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(RequestError, match="count 2; picture k has seed"):
        Request(prompt="", seed=MAX_SEED, count=2)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', '{"prompt": 1e999}'])
def test_wrong_json_gets_a_sentence(text: str | bytes) -> None:
    with pytest.raises(RequestError):
        Request.model_validate_json(text)


def test_no_torch_and_no_pillow_on_this_floor() -> None:
    code = "import sys, mezzotint.request; print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
