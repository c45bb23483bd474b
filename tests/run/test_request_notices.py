"""What is said of a request before it is drawn: `RunPlan.notices`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

import mezzotint
from conftest import SCHEDULER
from mezzotint import Request, RequestError, samplers
from mezzotint.records.record import read
from mezzotint.run.notices import mask_notices
from mezzotint.run.plan import plan_run

ROOT = Path(__file__).parents[2]
STEPS = 4


def notices(pipe: mezzotint.Pipeline, text: str = "a lemon", **fields: Any) -> tuple[str, ...]:
    return pipe.plan(Request(text, **{"steps": STEPS} | fields)).notices


@pytest.fixture
def lora_folder(tmp_path: Path) -> str:
    pair = {"lora_down": torch.ones(1, 4, 3, 3), "lora_up": torch.ones(16, 1, 1, 1)}
    save_file(
        {f"lora_unet_conv_in.{name}.weight": tensor for name, tensor in pair.items()}, tmp_path / "style.safetensors"
    )
    return str(tmp_path)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a lemon, left of a whale: [lemon:whale:0.5] (blue:1.3)", {}),
        ("masterpiece, 1girl, :), red_hair, 3:2 aspect", {"negative_prompt": "lowres, (bad hands:1.4), [blurry]"}),
        ("a lemon AND a red background :0.6 BREAK a whale", {}),
        ("C++ code, f/1.8, it's 10:30 at night, {{best}} \\(series\\), a_b, cat--dog :p <3", {}),
        ("a {red|blue} lemon (left:1.2)", {"prompt_syntax": "comfy"}),
        ("a lemon++ (blue sky)0.8", {"prompt_syntax": "compel"}),
        ("a lemon", {"sampler": "DPM++ 2M Karras", "steps": 20, "hires": 2.0, "width": 32, "height": 48}),
    ],
)
def test_an_ordinary_request_has_none(sd1: mezzotint.Pipeline, text: str, fields: dict[str, Any]) -> None:
    assert notices(sd1, text, **fields) == ()


MARKS_A_PROMPT = re.compile(
    r"""(?:mezzotint (?:generate|grid|plan|tokens)|pipe\(|Request\(|prompt=|"prompt":|--negative) *"([^"\n]*)"(.*)"""
)


def test_the_prompts_of_the_documentation_have_none(sd1: mezzotint.Pipeline) -> None:
    """But that a LoRA is not loaded, which the folder that their text names would do."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    found = [match for text in texts for match in MARKS_A_PROMPT.finditer(text)]
    assert len(found) > 40
    for match in found:
        syntax = next((name for name in ("comfy", "compel", "plain") if name in match[2]), "a1111")
        assert all(notice.startswith("<lora:") for notice in notices(sd1, match[1], prompt_syntax=syntax)), match[0]


def test_networks_that_are_not_loaded(sd1: mezzotint.Pipeline, lora_folder: str) -> None:
    text, style = "a lemon <lora:style:0.5> <hypernet:x:1>", f"{lora_folder}/style.safetensors"
    other = "<hypernet:x:1> is ignored: only LoRAs can be loaded"
    assert notices(sd1, text) == (
        "<lora:style:0.5> is ignored: give lora_folder (--lora-folder) to load it",
        other,
    )
    assert notices(sd1, text, lora_folder=lora_folder) == (other,)
    assert notices(sd1, text, loras=[style]) == (other,), "the file is loaded, as `again` does"
    [compel] = notices(sd1, "a lemon withLora(style, 0.5)", prompt_syntax="compel")
    assert compel.startswith("withLora(style, 0.5) is ignored")


@pytest.mark.parametrize("option", ["lbw=IN04", "dyn=4"])
def test_options_of_a_lora_that_are_not_read(sd1: mezzotint.Pipeline, lora_folder: str, option: str) -> None:
    tag = f"<lora:style:0.5:0.6:{option}>"
    [notice] = notices(sd1, tag, lora_folder=lora_folder)
    assert notice.startswith(f"{option} in {tag} is ignored") and "`loras`" in notice
    assert notices(sd1, "<lora:style:te=0.5:unet=0.6>", lora_folder=lora_folder) == ()


@pytest.mark.parametrize(
    ("text", "syntax", "words"),
    [
        ("a lemon, ratio 16:9", "a1111", r"weights the whole prompt (9), although there is no AND; write `:\9`"),
        ("a lemon #1 of ten", "a1111", "`#` hides the rest of its line (`#1 of ten`)"),
        ("a {red|blue} lemon", "a1111", "`{red|blue}` has no meaning in a1111"),
        ("a {0.7::red|0.3::blue} lemon", "comfy", "`0.7::` is read as words: a choice takes no weight"),
        ("a {2$$red|blue} lemon", "comfy", "`2$$` is read as words: a choice draws one option"),
        ("a lemon\nSteps: 25 | Seed: 7", "a1111", "`Steps: 25 | Seed: 7` looks like a line of settings"),
        ("a lemon\nNegative prompt: a whale", "plain", "`Negative prompt: a whale` looks like a line of settings"),
    ],
)
def test_remarks_on_a_prompt(sd1: mezzotint.Pipeline, text: str, syntax: str, words: str) -> None:
    """Also on the negative prompt, in which a number at the end has no meaning."""
    found = notices(sd1, text, prompt_syntax=syntax)
    assert any(one.startswith("prompt: ") and words in one for one in found), found
    found = notices(sd1, negative_prompt=text, prompt_syntax=syntax)
    assert any(one.startswith("negative_prompt: ") and words in one for one in found) is ("16:9" not in text), found


def test_a_choice_that_was_drawn_already(sd1: mezzotint.Pipeline) -> None:
    """`bulk` and `grid` resolve a request before they draw it, which draws its choices."""
    request = sd1.resolve(Request("a {0.7::red|0.7::blue} lemon", prompt_syntax="comfy"))
    [notice] = sd1.plan(request).notices
    assert "`0.7::` is read as words" in notice


def test_words_of_a_prompt_alone(sd1: mezzotint.Pipeline) -> None:
    found = notices(sd1, negative_prompt="a AND <lora:style:1> b")
    assert found == tuple(
        f"negative_prompt: `{mark}` has no meaning in a negative prompt, and is read as words"
        for mark in ("AND", "<lora:style:1>")
    )


def test_an_embedding_that_is_loaded_is_no_foreign_mark(sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(1, 16)}, tmp_path / "blob.safetensors")
    text = "a lemon, embedding:blob"
    assert notices(sd1, text, embeddings=[str(tmp_path / "blob.safetensors")]) == ()
    assert "`embedding:blob` has no meaning in a1111" in notices(sd1, text)[0]


# ---- noise levels ----------------------------------------------------------------------------------------------------


ZERO_SNR = SCHEDULER | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.fixture
def zero_snr(sd1: mezzotint.Pipeline) -> Callable[..., tuple[str, ...]]:
    """The notices of a zero-SNR model, like the bundled one."""
    info = replace(sd1._model.info, scheduler_config=ZERO_SNR)
    return lambda sampler, steps, **fields: plan_run(info, Request("", sampler=sampler, steps=steps, **fields)).notices


@pytest.mark.parametrize(
    ("sampler", "bad", "good"),
    [
        ("DPM++ 2M SDE Karras", 30, 40),
        ("dpmpp_2m_sde karras", 20, 40),
        ("DPM++ 3M SDE Karras", 30, 45),
        ("DPM++ 2M SDE", 10, 20),
        ("DPM++ 3M SDE", 12, 20),
        ("DPM++ 2M Karras", 11, 12),
    ],
)
def test_karras_on_a_model_of_zero_snr(
    zero_snr: Callable[..., tuple[str, ...]], sampler: str, bad: int, good: int
) -> None:
    """With the bundled model the first number of steps draws wrong colours, and the second does not."""
    [notice] = zero_snr(sampler, bad)
    assert "levels reach 4,519 (zero terminal SNR)" in notice and sampler in notice
    assert zero_snr(sampler, good) == ()
    assert zero_snr(sampler, bad, spacing="sgm_uniform") == (), "what the sentence suggests"


@pytest.mark.parametrize("sampler", ["DPM++ SDE Karras", "Euler a Karras", "DPM++ 2S a Karras", "Euler Karras"])
def test_other_solvers_take_wide_steps(zero_snr: Callable[..., tuple[str, ...]], sampler: str) -> None:
    assert zero_snr(sampler, 10) == ()


def test_karras_on_other_models(sd1: mezzotint.Pipeline) -> None:
    assert notices(sd1, sampler="DPM++ 2M SDE Karras", steps=8) == ()


def test_no_sampler_of_the_table_has_one_in_20_steps(
    sd1: mezzotint.Pipeline, zero_snr: Callable[..., tuple[str, ...]]
) -> None:
    """With its own spacing, on any model; of the names of other programs, those of the SDE solvers with Karras have."""
    for row in samplers.TABLE:
        assert notices(sd1, sampler=row.name, steps=20) == () == zero_snr(row.name, 20), row.name
    told = {name for name in samplers.NAMES if name.endswith("arras") and zero_snr(name, 20)}
    assert told == {
        name
        for name in samplers.NAMES
        if re.fullmatch(r"(DPM\+\+ [23]M SDE( Heun)?|dpmpp_[23]m_sde(_heun)?(_gpu)?) [Kk]arras", name)
    }


def test_a_list_that_begins_without_noise(sd1: mezzotint.Pipeline) -> None:
    [notice] = notices(sd1, sampler="euler", spacing="leading", steps=1)
    assert notice.startswith("the run begins at the noise level 0.041, but starts from noise alone")
    assert notices(sd1, sampler="euler", spacing="trailing", steps=1) == (), "what the sentence suggests"
    assert notices(sd1, sampler="euler", spacing="leading", steps=2) == ()
    [notice] = notices(sd1, sampler="euler", steps=None, sigmas=(0.5, 0.1, 0.0))
    assert "noise level 0.5" in notice


# ---- sizes and pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 72, "height": 64}, "drawn at 72x64, 4.5 times the pixels of the model's own 32x32"),
        (
            {"width": 32, "height": 32, "hires": 5.0},
            "hires 5 draws at 160x160, 25.0 times the pixels of the model's own",
        ),
        ({"hires": 2.0, "hires_strength": 0.4}, "hires_strength is 0.4, and enlarged latents stay blurry below 0.5"),
    ],
)
def test_sizes(sd1: mezzotint.Pipeline, fields: dict[str, Any], words: str) -> None:
    [notice] = notices(sd1, **fields)
    assert words in notice


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 64, "height": 64},
        {"hires": 4.0},
        {"hires": 2.0, "hires_strength": 0.5},
        {"hires": 2.0, "hires_strength": 0.3, "hires_upscale": "pixels"},
    ],
)
def test_sizes_without_a_notice(sd1: mezzotint.Pipeline, fields: dict[str, Any]) -> None:
    assert notices(sd1, **fields) == ()


def test_a_large_image(sd1: mezzotint.Pipeline) -> None:
    """Up to four times the sides is what hires-fix and upscaling use; --size is what the sentence suggests."""
    assert notices(sd1, image=Image.new("RGB", (128, 128))) == ()
    [notice] = notices(sd1, image=Image.new("RGB", (400, 300)))
    assert "drawn at 400x296, 115.6 times the pixels of the model's own 32x32" in notice
    assert notices(sd1, image=Image.new("RGB", (400, 300)), width=48, height=32) == ()


def mask(*boxes: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    image = Image.new("L", (128, 128))
    for box in boxes:
        image.paste(value, box)
    return image


def test_a_mask_of_few_cells() -> None:
    [notice] = mask_notices(mask((40, 40, 56, 48)), 8)
    assert "leaves only 2 of 256 cells of 8x8 pixels" in notice
    thin = [(k, k + 3, k + 1, k + 4) for k in range(120)]  # a line that meets no cell's first pixel, but 31 cells
    [notice] = mask_notices(mask(*thin, *((8 * k, 0, 8 * k + 1, 1) for k in range(2, 7))), 8)
    assert "leaves only 5 of 256 cells" in notice


def test_a_mask_of_enough_cells() -> None:
    assert [*mask_notices(mask((44, 44, 64, 64)), 8)] == [], "at no edge of a cell"
    assert [*mask_notices(mask((0, 0, 128, 128)).filter(ImageFilter.GaussianBlur(8)), 8)] == []
    assert [*mask_notices(None, 8)] == []


def test_a_mask_of_few_cells_is_a_notice_of_the_result_and_the_record(sd1: mezzotint.Pipeline) -> None:
    stroke = Image.new("L", (32, 32))
    stroke.paste(255, (4, 0, 8, 32))  # between the first pixels of the cells
    stroke.paste(255, (12, 0, 16, 32))
    stroke.paste(255, (0, 0, 1, 1))
    request = Request("", steps=2, image=Image.new("RGB", (32, 32)), mask=stroke)
    result = sd1.generate(request)
    assert [notice[:30] for notice in result.notices] == ["the mask leaves only 1 of 16 c"]
    record = read(result.images[0].info)
    assert record is not None and record.notices == result.notices


@pytest.mark.parametrize(
    ("mode", "colour", "invert", "words"),
    [
        (
            "RGB",
            "red",
            False,
            "its brightest value is 76, and only values from 128 to 255 are inpainted; paint the area white",
        ),
        ("L", 127, False, "its brightest value is 127"),
        ("L", 128, True, "its brightest value once inverted is 127"),
    ],
)
def test_a_dark_mask(mode: str, colour: Any, invert: bool, words: str, sd1: mezzotint.Pipeline) -> None:
    dark = Image.new(mode, (32, 32), "white" if invert else "black")
    dark.paste(colour, (0, 0, 24, 24))
    request = Request("", image=Image.new("RGB", (32, 32)), mask=dark, invert_mask=invert, steps=2)
    with pytest.raises(RequestError, match=f"mask is too dark: {words}"):
        sd1.generate(request)
    dark.paste(128 if mode == "L" and not invert else 127 if invert else "white", (0, 0, 24, 24))
    assert sd1.generate(request.replace(mask=dark)).notices == ()


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"steps": 60, "strength": 0.05, "fix_steps": True, "sampler": "euler", "spacing": "leading"},
            "steps is 60 and strength 0.05: with fix_steps, the run is the end of a list of 1,200 steps",
        ),
        ({"steps": 1200, "strength": 0.5, "sampler": "euler", "spacing": "leading"}, "steps is 1200"),
        (
            {"steps": 1200, "strength": 1.0, "fix_steps": True, "sampler": "euler", "spacing": "leading"},
            "steps is 1200",
        ),
    ],
)
def test_a_number_of_steps_that_nobody_gave(sd1: mezzotint.Pipeline, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=f"^{said}"):
        notices(sd1, image=Image.new("RGB", (32, 32)), **fields)


def test_a_number_of_steps_of_the_second_pass(sd1: mezzotint.Pipeline) -> None:
    fields = {"hires": 2.0, "hires_steps": 60, "hires_strength": 0.05, "fix_steps": True, "spacing": "leading"}
    with pytest.raises(RequestError, match=r"^hires_steps is 60 and hires_strength 0\.05: with fix_steps"):
        notices(sd1, sampler="euler", **fields)
