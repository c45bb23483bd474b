"""The tables of what solvers and guidance methods accept, against the functions themselves."""

from __future__ import annotations

import inspect

import pytest

from mezzotint.diffusion import solvers
from mezzotint.diffusion.guidance import METHOD_OPTIONS, METHODS
from mezzotint.samplers import SOLVERS
from mezzotint.samplers.names import NAMES, resolve


def test_the_table_has_every_solver() -> None:
    assert set(SOLVERS) == set(solvers.SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_row_is_the_signature_of_its_solver(name: str) -> None:
    _, _, _, _, *options = inspect.signature(solvers.SOLVERS[name]).parameters.values()
    found = {option.name: option.default for option in options}
    assert SOLVERS[name].eta == found.pop("eta", None)
    found.pop("cfg_pp", None)  # bound in the table of functions, nobody's option
    assert set(SOLVERS[name].options) == set(found)


@pytest.mark.parametrize("name", NAMES)
def test_no_sampler_passes_an_option_that_its_solver_lacks(name: str) -> None:
    sampler = resolve(name, {"_class_name": "PNDMScheduler"})
    solver = SOLVERS[sampler.solver]
    assert set(sampler.options) <= {*solver.options, *(() if solver.eta is None else ("eta",))}


@pytest.mark.parametrize("method", METHODS)
def test_options_of_guidance_are_those_of_the_functions(method: str) -> None:
    parameters = inspect.signature(METHODS[method]).parameters.values()
    assert METHOD_OPTIONS[method] == {option.name: option.default for option in parameters}
    assert set(METHOD_OPTIONS) == set(METHODS)
