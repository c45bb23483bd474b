"""ControlNet Union of a request: types, several pictures in one pass, sentences, the record and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_unet
from tests.run.test_controls import drawing

import mezzotint
from controls import WEIGHTS, write_control, write_union
from mezzotint import Request
from mezzotint.again import again, find_inputs, judge, read_source
from mezzotint.cli.fields import control_of
from mezzotint.entries.control import TYPES
from mezzotint.errors import RequestError
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.run.controls import control_scales


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Union of six types for the tiny SD1-shaped model, a ControlNet, and a picture."""
    place = tmp_path_factory.mktemp("union")
    with torch.random.fork_rng():
        unet = tiny_unet(0).config
    write_union(place / "net" / WEIGHTS, unet)
    write_control(place / "plain" / WEIGHTS, unet)
    drawing().save(place / "edge.png")
    drawing(seed=4).save(place / "depth.png")
    return place


def entry(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"file": folder / "net", "image": folder / "edge.png", "type": "canny", **fields}


def depth(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"image": folder / "depth.png", "type": "depth", **fields}


def test_the_forms_of_an_entry() -> None:
    """A name or a number; on the command line a second image begins a further picture; JSON."""
    text = "union.pth:image=a, b.png,type=pose,end=0.6,image=c.png,type=1,scale=0.5,image=d.png,type=3"
    fields = control_of(text)
    assert fields == {
        "file": "union.pth",
        "image": "a, b.png",
        "type": "pose",
        "end": "0.6",
        "more": [{"image": "c.png", "type": "1", "scale": "0.5"}, {"image": "d.png", "type": "3"}],
    }
    request = Request("a", control=[fields])
    assert request.control is not None
    one = request.control[0]
    assert one.types == [0, 1, 3] and one.scales == [1.0, 0.5, 1.0]
    assert [*one.pictures] == ["image", "more[0].image", "more[1].image"]
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert control_of("union.pth:type=tile,scale=2") == {"file": "union.pth", "type": "tile", "scale": "2"}
    published = ("openpose", "depth", "hed", "canny", "normal", "segment", "tile", "repaint")
    assert [TYPES[name] for name in published] == [*range(8)]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"type": "sketch"}, "control[0].type is 'sketch'; it must be openpose, depth, softedge, canny, normal"),
        ({"more": [{"image": "a.png"}]}, "control[0].more[0].type is missing; it must be openpose"),
        ({"more": [{"image": "a.png", "type": 1, "scale": -1}]}, "control[0].more[0].scale is -1; it must be a number"),
        ({"more": [{"type": 1, "file": "a"}]}, "control[0].more[0] has no field 'file'; it has image, type"),
    ],
)
def test_a_wrong_entry_is_named(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        Request("a", control=[{"file": "b.pth", **wrong}])
    assert sentence in str(error.value)


def test_what_does_not_fit_is_a_sentence(sd1: mezzotint.Pipeline, sd1_folder: Path, folder: Path) -> None:
    model = ModelHeaders.of(sd1_folder, device="cpu")
    for wrong, sentence in (
        (
            entry(folder, type=None),
            r"control\[0\].type is missing; this ControlNet Union has 6 types: openpose \(0\)",
        ),
        (entry(folder, type="tile"), r"control\[0\].type is tile; this ControlNet Union has 6 types: .*segment \(5\)$"),
        (entry(folder, more=[depth(folder, type=6)]), r"control\[0\].more\[0\].type is 6; this ControlNet Union has 6"),
        (entry(folder, more=[depth(folder, type=3)]), r"control\[0\] has two pictures of one type"),
        (entry(folder, file=folder / "plain"), r"control\[0\].type is given, and the file is not a ControlNet Union"),
        (entry(folder, file=folder / "plain", type=None, more=[depth(folder)]), r"control\[0\].more is given, and the"),
        (entry(folder, more=[{"type": 1}]), r"control\[0\].more\[0\].image is missing"),
    ):
        request = Request("a lemon", control=[wrong])
        with pytest.raises(RequestError, match=sentence):
            sd1.plan(request)
        with pytest.raises(RequestError, match=sentence):
            predict(model, request, base=0)


def test_the_scales_of_several_pictures(folder: Path) -> None:
    """They multiply each picture's features; the residuals have the mode's factors alone."""
    request = Request("a", control=[entry(folder, scale=0.5, more=[depth(folder)]), entry(folder, scale=0.5)])
    assert request.control is not None
    several, one = request.control
    assert control_scales(several, 3, 2, second_pass=False) == [(1.0,) * 3] * 2
    assert control_scales(one, 3, 2, second_pass=False) == [(0.5,) * 3] * 2
    off = several.replace(scale=0.0, more=[depth(folder, scale=0.0)])
    assert control_scales(off, 3, 2, second_pass=False) == [None, None]


def test_it_composes_and_is_drawn_again(sd1: mezzotint.Pipeline, folder: Path, tmp_path: Path) -> None:
    """Two pictures in one pass, a second network, hires-fix, a batch: again gives the same bits from base names."""
    control = [entry(folder, scale=0.8, more=[depth(folder)]), entry(folder, file=folder / "plain", type=None)]
    request = Request("a lemon", seed=3, count=2, batch=2, hires=2, hires_steps=2, control=control)
    result = sd1.generate(request)
    for other in (entry(folder, scale=0.8), entry(folder, scale=0.8, more=[depth(folder, type="normal")])):
        assert not torch.allclose(
            result.latents, sd1.generate(request.replace(control=[other, control[1]])).latents, atol=1e-4
        )
    path = tmp_path / "picture.png"
    result.images[1].save(path)
    source = read_source(path)
    assert source.record is not None and source.request.control is not None
    assert source.request.control[0].pictures == {"image": "edge.png", "more[0].image": "depth.png"}
    assert [*source.record.inputs] == ["control[0].image", "control[0].more[0].image", "control[1].image"]
    assert str(folder) not in str(result.images[1].info)
    found, _ = find_inputs(source, {}, [folder])
    files = [{"file": str(each["file"])} for each in control]
    assert judge(source, again(sd1, source, inputs=found, controls=files)[0]).identical
