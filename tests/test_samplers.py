"""Names and their meanings; that they draw what diffusers draws is in parity/test_samplers.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mezzotint import samplers
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.errors import RequestError
from mezzotint.samplers import NAMES, TABLE, resolve

SD1 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def test_the_names_are_those_that_run() -> None:
    assert set(samplers.SOLVERS) == set(SOLVERS)
    assert set(samplers.SPACINGS) == set(SPACINGS)
    assert [row.name for row in TABLE] == list(SOLVERS)


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_every_name_resolves(name: str | None, spacing: str | None) -> None:
    sampler = resolve(name, SD1, spacing)
    assert sampler.solver in SOLVERS and sampler.spacing in SPACINGS
    assert spacing in (None, sampler.spacing)
    assert sampler.schedule.beta_end == 0.012


def test_every_row_resolves_under_all_its_names() -> None:
    for row in TABLE:
        for spelling in (row.name, row.diffusers, *filter(None, [*row.a1111.split(", "), *row.comfyui.split(", ")])):
            assert resolve(spelling, SD1).solver == row.name
    assert len({row.diffusers for row in TABLE}) == len(TABLE)


def test_our_name_is_the_class() -> None:
    assert resolve("pndm", SD1) == resolve("PNDMScheduler", SD1) == resolve(None, SD1)


def test_stable_diffusion_1() -> None:
    sampler = resolve(None, SD1)
    assert (sampler.solver, sampler.spacing, sampler.start, sampler.rescale_final) == ("pndm", "leading", "vp", True)
    assert sampler.spacing_options == {"points": "n", "offset": 1, "last": "sigma_min"}


def test_a_missing_key_takes_the_default_of_the_class_that_runs() -> None:
    assert resolve("euler", SD1).spacing == "linspace"
    assert resolve("dpmpp_2m", SD1).spacing_options == {"points": "n+1", "round": True, "last": "zero"}
    assert resolve("ddim", SD1).spacing_options["last"] == "zero"  # set_alpha_to_one
    assert resolve("heun", {}).schedule.beta_end == 0.012
    assert resolve("euler", {}).schedule.beta_end == 0.02


def test_flags_that_a_class_does_not_know_are_ignored() -> None:
    config = SD1 | {"rescale_betas_zero_snr": True, "use_karras_sigmas": True, "solver_order": 3}
    assert resolve("euler", config).schedule.rescale_betas_zero_snr
    assert resolve("euler", config).spacing == "karras"
    assert not resolve("pndm", config).schedule.rescale_betas_zero_snr
    assert resolve("euler_a", config).spacing == "linspace"


def test_karras() -> None:
    euler, dpm = resolve("euler", SD1, "karras"), resolve("dpmpp_2m", SD1, "karras")
    assert euler.spacing_options["range"] == "linspace" and euler.timestep == "interpolated"
    assert dpm.spacing_options["range"] == "table" and dpm.timestep == "rounded"


def test_dialects() -> None:
    plain, karras = resolve("DPM++ 2M", SD1), resolve("DPM++ 2M Karras", SD1)
    assert (plain.spacing, plain.start, plain.timestep) == ("karras", "sigma", "interpolated")
    assert plain.spacing_options == karras.spacing_options == {}
    assert resolve("Euler a", SD1).spacing_options == {"log": True}
    assert resolve("Euler a", SD1).solver == resolve("euler_ancestral", SD1).solver == "euler_a"
    comfy = resolve("dpmpp_2m karras", SD1)
    assert (comfy.solver, comfy.spacing, comfy.start, comfy.timestep) == ("dpmpp_2m", "karras", "vp", "rounded")
    assert resolve("PLMS", {}).rescale_final


@pytest.mark.parametrize(
    ("name", "hint"), [("dpm++ 2m", "DPM\\+\\+ 2M"), ("eular", "euler"), ("DDIMSchedule", "DDIMScheduler")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"sampler is {name!r}".replace("+", "\\+") + f"; did you mean .*{hint}"):
        resolve(name, SD1)


def test_a_name_near_nothing_lists_them_all() -> None:
    with pytest.raises(RequestError, match="there are ddpm, ddim, pndm"):
        resolve("zzzzzzzz", SD1)
    with pytest.raises(RequestError, match="spacing is 'karas'; did you mean karras"):
        resolve("euler", SD1, "karas")


@pytest.mark.parametrize(
    ("name", "flags", "key"),
    [
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps = False .the model's"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order = 3"),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ("euler", {"timestep_spacing": "middle"}, "timestep_spacing = 'middle'"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddpm", {"variance_type": "learned"}, "variance_type"),
        ("ddpm", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("ddpm", {"prediction_type": "flow_prediction"}, "prediction_type"),
        (None, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
    ],
)
def test_what_is_not_supported_is_named(name: str | None, flags: dict[str, object], key: str) -> None:
    with pytest.raises(RequestError, match=key):
        resolve(name, SD1 | flags)


def test_prk_by_default_is_named_too() -> None:
    with pytest.raises(RequestError, match=r"skip_prk_steps = False \(the default of PNDMScheduler"):
        resolve("pndm", {})


def test_needs_no_torch() -> None:
    code = "import sys, mezzotint.samplers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
