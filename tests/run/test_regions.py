"""Regional prompts: weights of every place against explicit arithmetic, whole runs, records, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mezzotint
from mezzotint import Pipeline, Request, RequestError, regions
from mezzotint.again import again, find_inputs, read_source
from mezzotint.cli.fields import fields_of
from mezzotint.denoiser import Denoiser
from mezzotint.models.unet import Condition
from mezzotint.run.regions import part_weights

SIZE = {"width": 72, "height": 40}  # latents of 9x5
RIGHT = "regions[0].mask"


def blot() -> Image.Image:
    """A grey mask of another size than the picture's: soft noise on the right."""
    levels = np.random.default_rng(2).integers(0, 256, (80, 144), dtype=np.uint8)
    levels[:, :60] = 0
    return Image.fromarray(levels)


def weights_by_hand(cells: tuple[int, int], base: float) -> list[Tensor]:
    """The weights of three prompts, cell by cell in float64: of a prompt, a box on the left, and the mask's region."""
    height, width = cells
    mask = np.asarray(blot(), np.float64) / 255.0
    tall, wide = mask.shape[0] // height, mask.shape[1] // width
    found = torch.zeros(3, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            in_box = max(min((x + 1) / width, 0.4) - x / width, 0.0) * width
            in_mask = mask[y * tall : (y + 1) * tall, x * wide : (x + 1) * wide].mean()
            prompt = 1.0 - (1.0 - base) * min(in_box + in_mask, 1.0)
            parts = torch.tensor([prompt, 1.5 * in_box, 0.7 * in_mask], dtype=torch.float64)
            found[:, y, x] = parts / parts.sum()
    return [*found]


def request_of(**changes: Any) -> Request:
    two = [
        {"prompt": "a red whale", "box": (0.0, 0.0, 0.4, 1.0), "weight": 1.5},
        {"prompt": "a lemon", "mask": blot(), "weight": 0.7},
    ]
    usual = {"negative_prompt": "a blue background", "seed": 7, "steps": 3, "sampler": "euler", "guidance_scale": 5.0}
    return Request(**{"prompt": "a lemon on a blue background", "regions": two, **SIZE, **usual, **changes})


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("base", [0.0, 0.5])
def test_a_run_is_the_arithmetic_written_out(request: pytest.FixtureRequest, name: str, base: float) -> None:
    pipe: Pipeline = request.getfixturevalue(name)
    asked = request_of(region_base=base, **({"pag_scale": 2.0} if base else {}))
    plan = pipe.plan(asked)
    words = [asked.prompt, *(region.prompt for region in asked.regions or ()), asked.negative_prompt or ""]
    ids = torch.tensor([[40.0, 72.0, 0.0, 0.0, 40.0, 72.0]]) if name == "sdxl" else None
    conditions = [Condition(c.context, c.pooled, ids) for c in map(pipe.encode, words)]
    maps = weights_by_hand((5, 9), base)
    network = Denoiser(
        pipe.unet,
        plan.schedule,
        plan.prediction,
        conditions,
        plan.sampler.timestep,
        plan.sigmas,
        perturbed_layers=["mid"],
    )
    x = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(7)).double() * plan.noise_scale
    with torch.inference_mode():
        for sigma, after in zip(plan.sigmas, plan.sigmas[1:], strict=False):
            outputs = [one.double() for one in network.outputs(x.float(), sigma, perturbed=3)]
            unconditional = outputs[3]
            noise = unconditional.clone()
            for part, weight in enumerate(maps):
                noise += 5.0 * weight * (outputs[part] - unconditional)
                noise += (2.0 if base else 0.0) * weight * (outputs[part] - outputs[4 + part])
            x = x + (after - sigma) * noise
    drawn = pipe.generate(asked).latents.double()
    assert (drawn - x).abs().max() / x.abs().max() < 1e-4
    for changes in ({"regions": None, "region_base": None}, {"region_base": base + 0.5}):
        other = pipe.generate(asked.replace(**changes)).latents.double()
        assert (drawn - other).abs().max() / x.abs().max() > 1e-3


def test_hires_has_the_masks_at_its_own_size(sd1: Pipeline) -> None:
    second = sd1.plan(request_of(region_base=0.25, hires=2.0)).second_pass
    assert second is not None
    weights = part_weights(second, torch.device("cpu"))
    for found, expected in zip(weights, weights_by_hand((10, 18), 0.25), strict=True):
        assert isinstance(found, Tensor) and found.shape == (1, 1, 10, 18)
        torch.testing.assert_close(found[0, 0].double(), expected, rtol=0.0, atol=1e-6)
    plain = sd1.generate(request_of(hires=2.0, regions=None)).images[0]
    assert sd1.generate(request_of(hires=2.0)).images[0].tobytes() != plain.tobytes()


def test_batches_and_parts_with_weights_of_their_own(sd1: Pipeline) -> None:
    asked = request_of(count=2, guidance_scale=1.0)
    together, apart = (sd1.generate(asked.replace(batch=batch)).latents for batch in (2, 1))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    both = request_of(regions=[{"prompt": "a lemon AND a whale :0.5", "box": (0.5, 0.0, 1.0, 1.0)}])
    assert sd1.plan(both).weights == (1.0, 1.0, 0.5) and sd1.plan(both).condition_count == 4
    plan = sd1.plan(both.replace(guidance_scale=1.0))
    assert plan.guides  # what is missing to 1 in the region is the unconditional's
    assert not sd1.plan(asked).guides
    assert sd1.plan(request_of(pag_scale=1.0)).condition_count == 7


def test_columns_and_rows_are_those_of_a1111s_regional_prompter() -> None:
    boxes = [region.box for region in regions.columns("1,2,1", ["a", "b", "c"])]
    assert boxes == [(0.0, 0.0, 0.25, 1.0), (0.25, 0.0, 0.75, 1.0), (0.75, 0.0, 1.0, 1.0)]
    boxes = [region.box for region in regions.columns("1,1,1;3,1", ["a", "b", "c"])]
    assert boxes == [(0.0, 0.0, 0.5, 0.25), (0.5, 0.0, 1.0, 0.25), (0.0, 0.25, 1.0, 1.0)]
    assert [r.box for r in regions.rows("3,1", ["a", "b"])] == [(0.0, 0.0, 1.0, 0.75), (0.0, 0.75, 1.0, 1.0)]
    with pytest.raises(RequestError, match=r"columns '1,1' makes 2 regions, and 1 prompts are given"):
        regions.columns("1,1", ["a"])
    for ratios in ("", "1,0", "1,nan", "a", "1;;2"):
        with pytest.raises(RequestError, match=r"rows is .*; it must be numbers above 0"):
            regions.rows(ratios, ["a"])


def test_the_options_of_the_command_line() -> None:
    given = fields_of({"region": ["left@2=a=b", "0,0,1,0.25=c", "a@b.png=d", "m.png@0.5=e"], "region_base": 0.2})
    assert Request(prompt="", **given) == Request(
        prompt="",
        region_base=0.2,
        regions=[
            {"prompt": "a=b", "box": (0.0, 0.0, 0.5, 1.0), "weight": 2.0},
            {"prompt": "c", "box": (0.0, 0.0, 1.0, 0.25)},
            {"prompt": "d", "mask": "a@b.png"},
            {"prompt": "e", "mask": "m.png", "weight": 0.5},
        ],
    )
    split = fields_of({"region": ["a", "b"], "columns": "1,1"})["regions"]
    assert split == regions.columns("1,1", ["a", "b"])
    for options, sentence in (
        ({"region": ["a lemon"]}, "region is 'a lemon'; it must be PLACE=PROMPT"),
        ({"region": ["a"], "columns": "1", "rows": "1"}, "columns and rows are both given"),
    ):
        with pytest.raises(RequestError, match=sentence):
            fields_of(options)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            {"prompt": "a", "box": (0.5, 0.0, 0.5, 1.0)},
            r"regions\[1\].box is \(0.5, 0.0, 0.5, 1.0\); it must be \(left",
        ),
        ({"prompt": "a", "box": (0.0, 0.0, 2.0, 1.0)}, r"regions\[1\].box is 2.0; it must be \(left"),
        ({"prompt": "a", "weight": float("nan")}, r"regions\[1\].weight is nan; it must be a number above 0"),
        ({"prompt": "a", "weight": True}, r"regions\[1\].weight is True; it must be a number above 0"),
        ({"box": (0, 0, 1, 1)}, r"regions\[1\].prompt is missing; it must be a text"),
        ({"prompt": "a", "area": 1}, r"regions\[1\] has no field 'area'"),
        ("a lemon", r"regions\[1\] is 'a lemon'; it must be an object with prompt, box, mask, weight"),
    ],
)
def test_a_wrong_entry_gets_a_sentence(entry: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        Request(prompt="", regions=[{"prompt": "a", "box": (0, 0, 1, 1)}, entry])


def test_what_a_run_refuses(sd1: Pipeline, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    image = io.BytesIO()
    blot().save(image, "PNG")
    for changes, sentence in (
        ({"regions": [{"prompt": "a"}]}, r"regions\[0\] has neither box nor mask"),
        ({"regions": [{"prompt": "a", "box": (0, 0, 1, 1), "mask": blot()}]}, r"regions\[0\] has both box and mask"),
        ({"regions": [{"prompt": "a", "mask": str(tmp_path / "none.png")}]}, r"regions\[0\].mask is .* not there"),
        ({"regions": [{"prompt": "a", "mask": str(tmp_path / "black.png")}]}, r"regions\[0\].mask is black"),
        ({"regions": None, "region_base": 1.0}, "region_base is given, but there are no regions"),
        (
            {"image": image.getvalue(), "mask": image.getvalue(), "only_masked": 0},
            "regions and only_masked are both given",
        ),
        ({"image": image.getvalue(), "tile": 64}, "tile and regions are both given"),
    ):
        with pytest.raises(RequestError, match=sentence):
            sd1.plan(request_of(**changes))


def test_a_record_draws_it_again_with_the_masks_that_are_found(sd1: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    blot().save(tmp_path / "masks" / "right.png")
    mask = str(tmp_path / "masks" / "right.png")
    asked = request_of(regions=[{"prompt": "a whale", "mask": mask}, {"prompt": "a lemon", "box": (0, 0, 0.5, 1)}])
    image = sd1.generate(asked).images[0]
    image.save(tmp_path / "drawn.png")
    assert str(tmp_path) not in image.info["mezzotint"]
    source = read_source(tmp_path / "drawn.png")
    assert source.request.regions and source.request.regions[0].mask == "right.png"
    with pytest.raises(RequestError, match=r"the input picture \(regions\[0\].mask\) 'right.png' was changed or is"):
        find_inputs(source, {}, [tmp_path])
    for given, folders in (({"mask": str(tmp_path / "masks")}, []), ({}, [tmp_path / "masks"])):
        inputs, warnings = find_inputs(source, given, folders)
        assert inputs == {RIGHT: mask} and not warnings
    assert again(sd1, source, inputs=inputs)[0].tobytes() == image.tobytes()
    with pytest.raises(RequestError, match=r"regions\[0\] has neither box nor mask"):
        again(sd1, source)  # a name in a record is never opened
    data = Path(mask).read_bytes()
    assert (
        sd1.generate(asked.replace(regions=[{"prompt": "a whale", "mask": data}, asked.regions[1]])).images[0].tobytes()
        == image.tobytes()
    )  # type: ignore[index]


def test_both_regions_show_in_a_picture_of_the_bundled_model() -> None:
    pipe = mezzotint.load(device="cpu")
    two = regions.columns("1,1", ["a lemon on a red background", "a lemon on a green background"])
    image = pipe("", regions=two, seed=1, steps=4, sampler="euler")
    left, right = (np.asarray(image, float)[:, part].mean((0, 1)) for part in (slice(0, 48), slice(80, 128)))
    assert left[0] > left[1] + 40
    assert right[1] > right[0] + 20
