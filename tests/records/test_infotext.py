"""A1111's text: twenty as its versions and their extensions write them, read; and ours, read by its rules."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mezzotint.errors import RequestError
from mezzotint.records.infotext import A1111_NAMES, MAX_TEXT, _fields, parse, to_request, write
from mezzotint.request import Request
from mezzotint.samplers.names import NAMES
from mezzotint.samplers.presets import A1111_SAMPLERS, A1111_SCHEDULES, A1111_WITHOUT_SCHEDULE


@dataclass
class Theirs:
    """text; the fields of its Request that matter here; the starts of the notes, in order."""

    text: str
    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)


GPU = {"noise": "philox"}
EXAMPLES = {
    "autumn 2022": Theirs(
        "a lighthouse, oil on canvas\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, "
        "Model hash: 7460a6fa",
        {"prompt": "a lighthouse, oil on canvas", "negative_prompt": "", "steps": 20, "sampler": "Euler a",
         "guidance_scale": 7.0, "seed": 965400086, "width": 512, "height": 512, **GPU},
    ),
    "negative, two lines each": Theirs(
        "portrait of a baker,\n((flour)) [apron]\nNegative prompt: lowres, text,\ncropped\nSteps: 30, Sampler: LMS, "
        "CFG scale: 11.5, Seed: 1, Size: 448x704, Model hash: 925997e9",
        {"prompt": "portrait of a baker,\n((flour)) [apron]", "negative_prompt": "lowres, text,\ncropped",
         "guidance_scale": 11.5, "sampler": "LMS", "width": 448, "height": 704},
    ),
    "Karras in the sampler's name": Theirs(
        "fog\nSteps: 28, Sampler: DPM++ 2M Karras, CFG scale: 8, Seed: 4294967295, Size: 640x384, Model hash: "
        "cc6cb27103, Model: v1-5-pruned-emaonly, Version: v1.6.0",
        {"sampler": "DPM++ 2M Karras", "seed": 2**32 - 1, "width": 640, "height": 384},
    ),
    "Schedule type of its own (1.9)": Theirs(
        "fog\nSteps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 8, Seed: 5, Size: 640x384, Model hash: "
        "cc6cb27103, Model: v1-5-pruned-emaonly, Version: v1.9.4",
        {"sampler": "DPM++ 2M Karras"},
    ),
    "Schedule type Automatic": Theirs(
        "fog\nSteps: 20, Sampler: DPM++ 3M SDE, Schedule type: Automatic, CFG scale: 4.5, Seed: 5, Size: 1024x1024",
        {"sampler": "DPM++ 3M SDE", "guidance_scale": 4.5},
    ),
    "a schedule of two words": Theirs(
        "fog\nSteps: 20, Sampler: Euler, Schedule type: Align Your Steps, CFG scale: 7, Seed: 5, Size: 512x512",
        {"sampler": "Euler Align Your Steps"},
    ),
    "Clip skip, Eta and ENSD": Theirs(
        "1girl, umbrella\nNegative prompt: bad hands\nSteps: 24, Sampler: Euler a, CFG scale: 12, Seed: 77, Size: "
        "512x768, Model hash: 89d59c3dde, Model: anime, Clip skip: 2, Eta: 0.67, ENSD: 31337",
        {"clip_skip": 1, "eta": 0.67, "seed": 77},
        ["ENSD: 31337"],
    ),
    "hires by a factor": Theirs(
        "a valley\nSteps: 20, Sampler: DPM++ SDE Karras, CFG scale: 7, Seed: 3, Size: 512x512, Model hash: 0aecbcfa2c, "
        "Model: land, Denoising strength: 0.45, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, "
        "Version: v1.5.1",
        {"hires": 2.0, "hires_steps": 10, "hires_strength": 0.45, "hires_upscale": "latent", "strength": None,
         "width": 512, "sampler": "DPM++ SDE Karras"},
    ),
    "hires to a size, by another upscaler": Theirs(
        "a valley\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 512x384, Denoising strength: 0.3, "
        "Hires resize: 768x576, Hires upscaler: R-ESRGAN 4x+",
        {"hires": 1.5, "hires_strength": 0.3, "hires_upscale": "pixels", "hires_steps": None},
        ["Hires upscaler: R-ESRGAN 4x+: replaced by hires_upscale pixels"],
    ),
    "hires before 1.0: the size is the second pass's": Theirs(
        "a valley\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 1024x1024, Model hash: 7460a6fa, "
        "Denoising strength: 0.7, First pass size: 0x0",
        {"width": 512, "height": 512, "hires": 2.0, "hires_strength": 0.7},
    ),
    "variation seed and a seed resized": Theirs(
        "a fox\nSteps: 20, Sampler: Heun, CFG scale: 7, Seed: 10, Size: 512x512, Variation seed: 99, "
        "Variation seed strength: 0.25, Seed resize from: 384x512",
        {"variation_seed": 99, "variation_strength": 0.25, "seed_size": (384, 512), "sampler": "Heun"},
    ),
    "img2img": Theirs(
        "a fox\nSteps: 40, Sampler: DDIM, CFG scale: 9, Seed: 10, Size: 512x512, Model hash: 7460a6fa, "
        "Denoising strength: 0.75, Mask blur: 4",
        {"strength": 0.75, "mask_blur": 4.0, "sampler": "DDIM", "hires": None},
    ),
    "only masked": Theirs(
        "a hat\nSteps: 25, Sampler: UniPC, CFG scale: 7, Seed: 10, Size: 512x512, Denoising strength: 0.6, Inpaint "
        "area: Only masked, Masked area padding: 32, Masked content: latent noise, Version: v1.8.0",
        {"only_masked": 32, "masked_content": "noise", "strength": 0.6, "sampler": "UniPC"},
    ),
    "the last level but one discarded, and fields without a value": Theirs(
        "a fox\nSteps: 20, Sampler: Euler a, Schedule type: , CFG scale: , Seed: 10, Clip skip:, Size: 512x512, "
        "Denoising strength: , Eta: , Discard penultimate sigma: True",
        {"discard_penultimate_sigma": True, "guidance_scale": None, "clip_skip": None, "strength": None, "eta": None,
         "steps": 20, "seed": 10, "sampler": "Euler a"},
    ),
    "noise drawn on the CPU": Theirs(
        "a fox\nSteps: 20, Sampler: PLMS, CFG scale: 7, Seed: 10, Size: 512x512, RNG: CPU, Version: v1.3.0",
        {"noise": "seeded", "sampler": "PLMS"},
    ),
    "noise of NV, tiles, no norm": Theirs(
        "a wall\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 10, Size: 512x512, Tiling: True, RNG: NV, Emphasis: "
        "No norm, Version: v1.10.1",
        {"noise": "philox", "seamless": "xy", "emphasis": "no_norm"},
    ),
    "LoRA and TI hashes in quotes": Theirs(
        "a fox <lora:ink:0.8>, EasyNegative\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 10, Size: 512x512, "
        'Lora hashes: "ink: 0123456789ab, wet: ba9876543210", TI hashes: "EasyNegative: c74b4e810b03", Version: v1.6.0',
        {"prompt": "a fox <lora:ink:0.8>, EasyNegative", "seed": 10},
        ["Lora hashes: ink: 0123456789ab, wet: ba9876543210", "TI hashes: EasyNegative: c74b4e810b03",
         "<lora:ink:0.8>"],
    ),
    "a quoted value with quotes and line ends": Theirs(
        'a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 10, Size: 512x512, Wildcard prompt: "a \\"__red__\\", '
        'fox:\\nSteps: 99", Hires prompt: "x, y"',
        {"steps": 20},
        ['Wildcard prompt: a "__red__", fox:\nSteps: 99', "Hires prompt: x, y"],
    ),
    "dynamic prompts' templates behind it": Theirs(
        "a red fox\nNegative prompt: dark\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 10, Size: 512x512\n"
        "Template: a {red|blue} fox\nNegative Template: {dark|wet}",
        {"prompt": "a red fox", "negative_prompt": "dark", "seed": 10},
    ),
    "Civitai's hashes and resources": Theirs(
        'a fox\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 10, Size: 832x1216, Clip skip: 2, Hashes: {"model": '
        '"31e35c80fc", "lora:ink": "0123456789"}, Created Date: 2024-01-01T00:00:00.0Z, Civitai resources: '
        '[{"type":"checkpoint","modelVersionId":1,"modelName":"a, b: c"}], Civitai metadata: {}',
        {"width": 832, "height": 1216, "clip_skip": 1},
    ),
    "an unknown sampler and refiner": Theirs(
        "a fox\nSteps: 20, Sampler: Restart v9, CFG scale: 7, Seed: 10, Size: 512x512, Refiner: sd_xl_refiner_1.0 "
        "[7440042bbd], Refiner switch at: 0.8, Version: v1.6.0-2-g4afaaf8a",
        {"sampler": None, "refiner": "sd_xl_refiner_1.0", "refiner_at": 0.8},
        ["Sampler: Restart v9 is unknown"],
    ),
    "no negative line, empty prompt, CRLF": Theirs(
        "\r\nNegative prompt: dark\r\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 10, Size: 512x512\r\n",
        {"prompt": "", "negative_prompt": "dark", "steps": 20},
    ),
    "a prompt that talks like a last line": Theirs(
        "Steps: to the sea, Size: large\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 10, Size: 512x512",
        {"prompt": "Steps: to the sea, Size: large", "steps": 20},
    ),
    "odd sizes are cut, seed -1 is any": Theirs(
        "a\nSteps: 20, Sampler: Euler A, CFG scale: 7, Seed: -1, Size: 515x700",
        {"width": 512, "height": 696, "seed": None, "sampler": "Euler a"},
        ["Seed: a negative seed"],
    ),
    "names in another spelling, of which A1111's wins": Theirs(
        "a\nSteps: 20, Sampler: Euler_A, Schedule type: sgm-uniform, CFG scale: 7, Seed: 1, Size: 512x512",
        {"sampler": "Euler a SGM Uniform"},
    ),
    "a name in lower case is A1111's": Theirs(
        "a\nSteps: 20, Sampler: euler, CFG scale: 7, Seed: 1, Size: 512x512", {"sampler": "Euler"}
    ),
    "Forge's schedule that is not here": Theirs(
        "a\nSteps: 20, Sampler: Euler, Schedule type: React Cosinusoidal DynSF, CFG scale: 7, Seed: 1, Size: 512x512, "
        "Distilled CFG Scale: 3.5",
        {"sampler": "Euler"},
        ["Schedule type: React Cosinusoidal DynSF is unknown for Euler", "Distilled CFG Scale: 3.5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_their_texts_are_read_right(name: str) -> None:
    theirs = EXAMPLES[name]
    request, notes = to_request(parse(theirs.text))
    assert {field: getattr(request, field) for field in theirs.fields} == theirs.fields
    assert len(notes) == len(theirs.notes), notes
    for note, start in zip(notes, theirs.notes, strict=True):
        assert note.startswith(start)
    untouched = {
        f for f in Request.model_fields if f not in theirs.fields and f.startswith(("apg", "cfg_zero", "perp"))
    }
    assert all(getattr(request, field) is None for field in untouched)


def by_their_rules(text: str) -> tuple[str, str, dict[str, str]]:
    """How A1111 takes a text apart (1.10.1): (prompt, negative prompt, fields). Written as a scanner, from the rules:

    the last line has the fields if it has three or more; a name is two or more of word characters, space, - and /,
    beginning with a word character, before a colon; a value is a quoted string that a comma or the end follows, or all
    up to the next comma; what cannot be a name is passed over.
    """
    *lines, last = text.strip().split("\n")
    fields: list[tuple[str, str]] = []
    at = 0
    while at < len(last):
        start = at
        while start < len(last) and last[start].isspace():
            start += 1
        end = start
        while end < len(last) and (last[end].isalnum() or last[end] in "_ -/"):
            end += 1
        named = end - start >= 2 and (last[start].isalnum() or last[start] == "_") and last[end : end + 1] == ":"
        if not named:
            at += 1
            continue
        value = end + 1
        while value < len(last) and last[value].isspace():
            value += 1
        stop = value
        if last[value : value + 1] == '"':
            stop = value + 1
            while stop < len(last) and last[stop] != '"':
                stop += 2 if last[stop] == "\\" else 1
            stop += 1
            if stop - value < 3 or stop > len(last) or last[stop : stop + 1] not in ("", ","):
                stop = value
        if stop == value:
            stop = last.find(",", value) if "," in last[value:] else len(last)
        found = last[value:stop]
        if found[:1] == '"' and found[-1:] == '"' and len(found) > 1:
            with suppress(ValueError):
                found = str(json.loads(found))
        fields.append((last[start:end], found))
        at = stop + 1
    if len(fields) < 3:
        lines, fields = [*lines, last], []
    prompt, negative, seen = "", "", False
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            seen, line = True, line[16:].strip()
        if seen:
            negative += ("\n" if negative else "") + line
        else:
            prompt += ("\n" if prompt else "") + line
    return prompt, negative, dict(fields)


PLAIN = [
    name for name in EXAMPLES if not {"Template:", "Civitai", "CRLF"} & {*name.split(), *EXAMPLES[name].text.split()}
]


@pytest.mark.parametrize("name", [n for n in PLAIN if "templates" not in n and "Civitai" not in n and "CRLF" not in n])
def test_the_scanner_and_ours_agree(name: str) -> None:
    found = parse(EXAMPLES[name].text)
    prompt, negative, fields = by_their_rules(EXAMPLES[name].text)
    given = {field: value for field, value in fields.items() if value}  # the program skips the others when it uses them
    assert (found.prompt, found.negative_prompt, dict(found.fields)) == (prompt, negative, given)


def theirs_as_numbers(request: Request, seed: int) -> dict[str, str]:
    """What A1111's fields must hold for a request of ours."""
    assert request.steps and isinstance(request.guidance_scale, float)
    scale = request.guidance_scale * (12.5 if request.sampler == "euler_cfg_pp" else 1.0)  # its DDIM CFG++ divides it
    return {
        "Steps": str(request.steps),
        "CFG scale": str(scale),
        "Seed": str(seed),
        "Size": f"{request.width}x{request.height}",
        "RNG": "NV" if request.noise == "philox" else "CPU",
    }


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
    negative=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
    model=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    number=st.integers(0, 2**64 - 1),
)
@example(prompt="", negative="", model="0", number=8139)  # euler_cfg_pp, whose scale is another in A1111
def test_ours_is_read_by_their_rules(prompt: str, negative: str, model: str, number: int) -> None:
    chance = random.Random(number)
    request = Request(
        prompt=prompt,
        negative_prompt=negative,
        width=8 * chance.randint(1, 200),
        height=8 * chance.randint(1, 200),
        steps=chance.randint(1, 150),
        guidance_scale=chance.choice([1.0, 7.5, 4.25]),
        sampler=chance.choice(NAMES),
        spacing=chance.choice([None, "karras", "leading", "sgm_uniform", "ays"]),
        clip_skip=chance.choice([0, 1]),
        emphasis=chance.choice(["original", "no_norm", "ignore"]),
        noise=chance.choice(["seeded", "philox"]),
        eta=chance.choice([None, 0.0, 0.5]),
        hires=chance.choice([None, 1.5]),
        hires_strength=0.5,
        variation_seed=chance.choice([None, 5]),
    )
    text = write(request, number, model, "0.1.0", "0123456789")
    found_prompt, found_negative, fields = by_their_rules(text)
    if "Negative prompt:" not in prompt + negative:
        assert (found_prompt, found_negative) == (prompt.strip(), negative.strip())
    assert theirs_as_numbers(request, number).items() <= fields.items()
    written = fields.get("Model")  # in quotes where it would be misread
    assert written in (model, model.replace("\0", "\ufffd")) or model != model.strip() or '"' in model
    assert fields.get("Schedule type", "Automatic") in ("Automatic", *A1111_SCHEDULES)
    assert fields["Sampler"] in (*A1111_SAMPLERS, *A1111_WITHOUT_SCHEDULE) or fields["Sampler"] not in A1111_NAMES
    again, notes = to_request(parse(text))
    same = ("width", "height", "steps", "guidance_scale", "clip_skip", "noise", "eta", "hires", "variation_seed")
    if request.clip_skip == 0:
        again = again.replace(clip_skip=0)
    expected = {f: getattr(request, f) for f in same} | {"guidance_scale": float(fields["CFG scale"])}
    assert {f: getattr(again, f) for f in same} == expected
    assert again.seed == number and not [n for n in notes if not n.startswith(("Sampler", "Schedule", "<"))]


@pytest.mark.parametrize(
    ("sampler", "spacing", "written"),
    [
        ("euler_a", "linspace", "Sampler: Euler a, CFG"),
        ("dpmpp_2m", "karras", "Sampler: DPM++ 2M, Schedule type: Karras,"),
        ("Euler a", "normal", "Sampler: Euler a, Schedule type: Uniform,"),
        ("Euler a Karras", "karras", "Sampler: Euler a, Schedule type: Karras,"),
        ("Euler Align Your Steps", "ays", "Sampler: Euler, Schedule type: Align Your Steps,"),
        ("DPM++ 2M SDE Heun Automatic", "exponential", "Sampler: DPM++ 2M SDE Heun, Schedule type: Exponential,"),
        ("euler", "sgm_uniform", "Sampler: Euler, Schedule type: SGM Uniform,"),
        ("DDIM", "ddim_uniform", "Sampler: DDIM, CFG"),
        ("gradient_estimation", "normal", "Sampler: gradient_estimation, Schedule type: Uniform,"),
    ],
)
def test_samplers_and_schedules_have_their_names(sampler: str, spacing: str, written: str) -> None:
    request = Request(prompt="x", width=8, height=8, steps=1, guidance_scale=7.5, sampler=sampler, spacing=spacing)
    assert written in write(request, 0, "emoji", "0.1.0")


def test_what_a_text_names_and_quotes() -> None:
    request = Request(
        prompt="x", width=8, height=8, steps=1, clip_skip=1, eta=0.5, guidance_rescale=0.7, spacing="karras"
    )
    assert write(request, 0, "a, b: c", "0.1.0", "0123456789") == (
        'x\nSteps: 1, Schedule type: Karras, Seed: 0, Size: 8x8, Model hash: 0123456789, Model: "a, b: c", Clip skip: '
        "2, Eta: 0.5, CFG rescale: 0.7, RNG: CPU, Version: mezzotint 0.1.0"
    )


@pytest.mark.parametrize(
    ("sampler", "scale", "written"),
    [
        ("euler_cfg_pp", 0.6, "Sampler: DDIM CFG++, CFG scale: 7.5,"),
        ("euler_cfg_pp", (0.8, 0.4), 'Sampler: DDIM CFG++, CFG scale: "(10.0, 5.0)",'),
        ("DDIM CFG++", 7.5, "Sampler: DDIM CFG++, CFG scale: 7.5,"),
        ("euler", 7.5, "Sampler: Euler, CFG scale: 7.5,"),
    ],
)
def test_ours_has_the_scale_that_a1111_would_need(sampler: str, scale: Any, written: str) -> None:
    assert written in write(Request(prompt="x", sampler=sampler, guidance_scale=scale), 0, "emoji", "0.1.0")


# ---- texts that somebody made up -------------------------------------------------------------------------------------

LAST = "\nSteps: 20, Sampler: Euler, CFG scale: {}, Seed: {}, Size: {}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x" + LAST.format("seven", 1, "8x8"), "CFG scale: 'seven', which cannot be read"),
        ("x" + LAST.format("nan", 1, "8x8"), "guidance_scale is nan"),
        ("x" + LAST.format("1e999", 1, "8x8"), "guidance_scale is inf"),
        ("x" + LAST.format(7, "9" * 5000, "8x8"), "Seed: '9999"),
        ("x" + LAST.format(7, 2**64, "8x8"), "seed is 18446744073709551616"),
        ("x" + LAST.format(7, 1, "0x0"), "width is 0"),
        ("x" + LAST.format(7, 1, "800000x8"), "width is 800000"),
        ("x" + LAST.format(7, 1, "8x8") + ", Eta: x", "Eta: 'x', which cannot be read"),
        ("x" + LAST.format(7, 1, "8x8") + ", Clip skip: 1000", "clip_skip is 999"),
        ("x" + LAST.format(7, 1, "8x8") + ", RNG: /dev/urandom", "RNG: '/dev/urandom', which cannot be read"),
        ("x" * 100_001 + LAST.format(7, 1, "8x8"), "prompt is 100,001 characters long"),
        ("x" * (MAX_TEXT + 1), "at most 16,000,000 are read"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value)[-30:],
)
def test_what_cannot_be_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=re.escape(sentence)) as caught:
        to_request(parse(text))
    assert len(str(caught.value)) < 600


@given(st.text(max_size=300))
def test_any_text_is_taken_apart(text: str) -> None:
    found = parse(text)
    assert len(found.prompt) + len(found.negative_prompt) <= len(text)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "ab:" * 300_000,
        'ab:"' + "\\" * 500_000,
        'ab:"\\",' * 100_000,
        "ab: [" * 200_000,
        "ab: [1," * 200_000,
        "ab:" + "[" * 500_000,
        "\n" * 10**6,
    ],
    ids=range(8),
)
def test_no_text_takes_long(text: str) -> None:
    parse(text)


def test_a_field_has_a_name_of_two_letters() -> None:
    """As in A1111's pattern; a single one is part of a value."""
    assert dict(_fields("Steps: 20, NG: yes, x: 3, Seed: 7")).keys() == {"Steps", "NG", "Seed"}
