"""Solver functions of a user's own: as a sampler, by a registered name, in records, and where they are not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mezzotint
from mezzotint import Pipeline, Request, RequestError, samplers
from mezzotint.again import again, read_source
from mezzotint.diffusion.solvers import SOLVERS, Step
from mezzotint.grid import draw, plan_grid
from mezzotint.records.record import read as read_record

LEMON = Request(prompt="a lemon", seed=7, steps=3)


def own_euler(denoise: Any, x: Tensor, sigmas: list[float], noise: Any, scale: float = 1.0) -> Iterator[Step]:
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = scale * denoise(x, sigma)
        x = denoised + (sigma_next / sigma) * (x - denoised)
        yield Step(i, sigma_next, x, denoised)


def latents(pipe: Pipeline, **fields: Any) -> Tensor:
    return pipe.generate(LEMON.replace(**fields)).latents


def test_a_function_draws_what_the_solver_of_the_same_steps_draws(sd1: Pipeline) -> None:
    for fields in ({}, {"spacing": "karras"}, {"steps": 5, "guidance_scale": 1.0}):
        assert torch.equal(latents(sd1, sampler=own_euler, **fields), latents(sd1, sampler="euler", **fields))
    ancestral = SOLVERS["dpmpp_2s_a"]  # a partial, which draws noise
    assert torch.equal(latents(sd1, sampler=ancestral), latents(sd1, sampler="dpmpp_2s_a"))
    assert sd1("a lemon", seed=7, sampler=own_euler).tobytes() == sd1("a lemon", seed=7, sampler="euler").tobytes()


def test_a_registered_name_with_its_defaults(sd1: Pipeline) -> None:
    name = samplers.register("mine", own_euler, spacing="karras", steps=2, guidance_scale=2.0, options={"scale": 0.5})
    result = sd1.generate(Request(prompt="a lemon", seed=7, sampler=name))
    request = result.request
    assert (request.sampler, request.spacing, request.steps, request.guidance_scale) == ("mine", "karras", 2, 2.0)
    plain = {"spacing": "karras", "steps": 2, "guidance_scale": 2.0}
    assert not torch.equal(result.latents, latents(sd1, sampler="euler", **plain))  # scale is heard
    samplers.register("mine", own_euler)  # again: it replaces the first
    assert torch.equal(latents(sd1, sampler="mine", **plain), latents(sd1, sampler="euler", **plain))
    assert mezzotint.samplers is samplers and samplers.SOLVERS["mine"].calls == 1


def test_eta_is_passed_where_the_solver_takes_it(sd1: Pipeline) -> None:
    plain = latents(sd1, sampler=SOLVERS["dpm2"])
    samplers.register("mine", SOLVERS["dpm2"], eta=0.5)
    assert sd1.resolve(LEMON.replace(sampler="mine")).eta == 0.5
    assert torch.equal(latents(sd1, sampler="mine", eta=0.0), plain)
    assert not torch.equal(latents(sd1, sampler="mine"), latents(sd1, sampler="mine", eta=0.0))
    with pytest.raises(RequestError, match="does not take eta"):
        sd1.resolve(LEMON.replace(sampler=own_euler, eta=0.5))


def test_a_request_keeps_the_name_in_json_and_functions_of_one_name_apart() -> None:
    def make(scale: float) -> Callable[..., Iterator[Step]]:
        def solver(*args: Any) -> Iterator[Step]:
            return own_euler(*args, scale=scale)

        return solver

    one, two = make(1.0), make(2.0)
    request = Request(prompt="a lemon", sampler=own_euler)
    assert request.sampler == f"{__name__}:own_euler"
    assert Request.model_validate_json(request.model_dump_json()) == request == request.replace(steps=None)
    names = [Request(prompt="a lemon", sampler=solver).sampler for solver in (one, two, one, two)]
    assert names[:2] == names[2:] and len({*names}) == 2 and names[1] == f"{names[0]}#2"


@pytest.mark.parametrize("name", ["mine", None])
def test_the_record_names_it_and_again_draws_it_where_it_is_registered(
    sd1: Pipeline, tmp_path: Path, name: str | None
) -> None:
    name = samplers.register(name, own_euler) if name else samplers.name_of(own_euler)
    result, path = sd1.generate(LEMON.replace(sampler=name)), tmp_path / "lemon.png"
    result.save(path)
    record = read_record(result.images[0].info)
    assert record is not None
    assert record.request.sampler == name and record.model.solver == f"{__name__}:own_euler"
    assert f"Sampler: {name if name == 'mine' else json.dumps(name)}," in result.images[0].info["parameters"]
    (image,) = again(sd1, read_source(path))
    assert image.tobytes() == result.images[0].tobytes()
    samplers.unregister(name)
    with pytest.raises(RequestError) as error:
        read_source(path)
    for part in (str(path), f"{name!r} is the function {__name__}:own_euler", f"samplers.register({name!r}, function)"):
        assert part in str(error.value)


def test_a_grid_over_it(sd1: Pipeline, tmp_path: Path) -> None:
    samplers.register("mine", own_euler)
    paths = draw(sd1, plan_grid(sd1, LEMON, "sampler=mine,euler,ddim"), tmp_path)
    pixels = [path.read_bytes() for path in paths]
    names = [read_source(path).request.sampler for path in paths]
    assert len({*pixels}) == 3 and names == ["mine", "euler", "ddim"]


@pytest.mark.parametrize(
    ("solver", "sentence"),
    [
        (lambda *_: [1, 2], "returned a list; it must be a generator that yields Step"),
        (lambda *_: iter([]), "yielded no step"),
        (lambda _, x, *__: iter([x]), "yielded a Tensor; it must"),
        (lambda _, x, *__: iter([Step(0, 0.0, x[0], x[0])]), r"yielded x of shape \(4, 4, 4\) for \(1, 4, 4, 4\)"),
    ],
)
def test_a_function_that_is_no_solver_is_a_sentence(sd1: Pipeline, solver: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        sd1.generate(LEMON.replace(sampler=solver))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("euler", own_euler), "the name 'euler' is that of another sampler"),
        (("DPM++ 2M Karras", own_euler), "is that of another sampler"),
        (("", own_euler), "it must be a text of 1 to 100 characters"),
        (("mine", lambda denoise, x, sigmas: iter(())), "as solver(denoise, x, sigmas, noise): too many positional"),
        (("mine", 3), "the solver 'mine' is of type int; it must be a generator function"),
    ],
)
def test_what_cannot_be_registered(arguments: tuple[Any, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=re.escape(sentence)):
        samplers.register(*arguments)
    with pytest.raises(RequestError, match="spacing is 'kerras'; did you mean karras"):
        samplers.register("mine", own_euler, spacing="kerras")


def test_a_name_that_is_not_registered(sd1: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"call mezzotint.samplers.register\('work:solver', function\) first"):
        sd1.resolve(LEMON.replace(sampler="work:solver"))
    samplers.register("my_solver", own_euler)
    with pytest.raises(RequestError, match="did you mean my_solver"):
        Request(prompt="a lemon", sampler="my_solve")
    assert json.dumps(LEMON.model_dump())
