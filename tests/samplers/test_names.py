"""Names and their meanings; that they draw what diffusers draws is in parity/test_samplers.py."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mezzotint import samplers
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.errors import RequestError
from mezzotint.request import Request
from mezzotint.samplers import presets
from mezzotint.samplers.diffusers_classes import CLASSES
from mezzotint.samplers.names import NAMES, TABLE, resolve
from mezzotint.samplers.presets import PRESETS

SD1 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_max": 60.0, "prediction_type": "v_prediction", "skip_prk_steps": True}


def levels(name: str, steps: int, config: dict[str, Any] = SD1, spacing: str | None = None) -> list[float]:
    sampler = resolve(name, config, spacing)
    return SPACINGS[sampler.spacing](Schedule.from_config(sampler.schedule), steps, **sampler.spacing_options)


def test_the_names_are_those_that_run() -> None:
    assert set(samplers.SOLVERS) == set(SOLVERS)
    assert set(samplers.SPACINGS) == set(SPACINGS)
    assert {row.name for row in TABLE} == set(SOLVERS)


@pytest.mark.parametrize("config", [SD1, EDM], ids=["sd1", "edm"])
def test_every_name_with_every_spacing(config: dict[str, Any]) -> None:
    """Options that the solver and the spacing know, and a falling list."""
    for name in NAMES if config is SD1 else [*SOLVERS, "Euler Karras", "EDMEulerScheduler"]:
        for spacing in (None, *SPACINGS) if name in SOLVERS or name == "Euler Karras" else (None, "karras"):
            if resolve(name, config).solver == "dpm_adaptive" and spacing not in (None, "exponential"):
                continue
            sampler = resolve(name, config, spacing)
            assert spacing in (None, sampler.spacing)
            assert set(sampler.options) <= set(inspect.signature(SOLVERS[sampler.solver]).parameters), name
            sigmas = SPACINGS[sampler.spacing](Schedule.from_config(sampler.schedule), 4, **sampler.spacing_options)
            assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] >= 0.0, (name, spacing)
            # the record holds both names: they must mean the same again
            assert resolve(sampler.name, config, sampler.spacing) == sampler


def test_every_row_resolves_under_all_its_names() -> None:
    for row in TABLE:
        for spelling in (row.name, *filter(None, [*row.a1111.split(", "), *row.comfyui.split(", ")])):
            assert resolve(spelling, SD1).solver == row.name
        if row.diffusers:
            assert CLASSES[row.diffusers].name == row.diffusers
        assert row.order in (1, 2, 3) and row.calls in (1, 2, 3) and row.good_for


def test_the_table_marks_stochastic_solvers() -> None:
    for row in TABLE:
        parameters = inspect.signature(SOLVERS[row.name]).parameters
        eta = parameters["eta"].default if "eta" in parameters else None
        assert row.stochastic == (eta == 1.0 or row.name in ("lcm", "sa_solver", "er_sde", "restart")), row.name


def test_our_name_is_the_class() -> None:
    assert resolve("pndm", SD1) == resolve("PNDMScheduler", SD1) == resolve(None, SD1)
    assert resolve("DPMSolverMultistepScheduler", SD1).name == "dpmpp_2m"
    assert resolve("dpmpp_3m_sde", SD1).options["order"] == 3 and resolve("dpmpp_3m_sde", SD1).options["eta"] == 1.0


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
    # a type that is another class's is not this one's
    assert resolve("dpmpp_2m", SD1 | {"solver_type": "bh2"}).options["solver_type"] == "midpoint"
    assert resolve("unipc", SD1 | {"solver_type": "logrho"}).options["solver_type"] == "bh2"


def test_the_offset_that_stable_diffusion_pipelines_set() -> None:
    """A key that is missing from the file is set for the file's own class alone, as it is loaded by diffusers."""
    missing = {key: value for key, value in SD1.items() if key != "steps_offset"}

    def offset(name: str | None, config: dict[str, Any], pipeline: str) -> int:
        return int(resolve(name, config, pipeline=pipeline).spacing_options["offset"])

    for config in (missing, SD1 | {"steps_offset": 0}):
        assert offset(None, config, "StableDiffusionPipeline") == offset("pndm", config, "StableDiffusionPipeline") == 1
        assert offset(None, config, "StableDiffusionXLPipeline") == 0
    assert offset("ddim", missing, "StableDiffusionPipeline") == 0
    assert offset("ddim", SD1 | {"steps_offset": 0}, "StableDiffusionPipeline") == 1


def test_karras() -> None:
    euler, dpm = resolve("euler", SD1, "karras"), resolve("dpmpp_2m", SD1, "karras")
    assert euler.spacing_options["range"] == "linspace" and euler.timestep == "interpolated"
    assert dpm.spacing_options["range"] == "table" and dpm.timestep == "rounded"


def test_a1111() -> None:
    plain, karras = resolve("DPM++ 2M", SD1), resolve("DPM++ 2M Karras", SD1)
    assert (plain.spacing, plain.start, plain.timestep) == ("karras", "sigma", "interpolated")
    assert (karras.spacing, karras.spacing_options) == (plain.spacing, plain.spacing_options)
    assert resolve("DPM++ 2M Automatic", SD1).spacing == "karras"
    assert resolve("DPM++ 2M SDE", SD1).spacing == resolve("DPM++ 3M SDE", SD1).spacing == "exponential"
    assert resolve("Euler a", SD1).spacing == "normal" and resolve("Restart", SD1).spacing == "karras"
    assert len(presets.A1111_SAMPLERS) + len(presets.A1111_WITHOUT_SCHEDULE) == 20 + 5  # and Forge's five
    assert {"HeunPP2", "IPNDM", "IPNDM_V", "DEIS", "DDPM"} < set(presets.A1111_SAMPLERS)
    assert len(presets.A1111_SCHEDULES) + 1 == 12 + 4  # with Automatic, and Forge's four
    assert {"Turbo", "Align Your Steps GITS", "Align Your Steps 11", "Align Your Steps 32"} < set(
        presets.A1111_SCHEDULES
    )
    assert resolve("DPM++ SDE", SD1).noise == "brownian midpoints" and resolve("DPM++ 2M SDE", SD1).noise == "brownian"


def test_the_penultimate_level_is_dropped() -> None:
    full, dropped = levels("Euler Karras", 11), levels("DPM2 a", 10)
    assert dropped == [*full[:10], 0.0]
    assert levels("dpm_2 karras", 10) == levels("dpm_2_ancestral karras", 10) == dropped
    assert levels("uni_pc_bh2 karras", 10) == [*full[:10], 0.001]
    assert levels("uni_pc karras", 10) == [*full[:10], 0.001]
    assert levels("DPM2 KL Optimal", 10)[-1] == Schedule.from_config(resolve("DPM2", SD1).schedule).sigma_min


def test_a1111_samplers_that_take_no_schedule() -> None:
    ddim = levels("DDIM", 20)
    schedule = Schedule.from_config(resolve("DDIM", SD1).schedule)
    assert ddim == [schedule.sigma(t) for t in range(951, 0, -50)]  # 19 steps, and it stops at timestep 1
    assert resolve("PLMS", {}).rescale_final
    assert levels("UniPC", 4) == pytest.approx(
        [schedule.sigma(t, "log_alpha") for t in (999, 749.25, 499.5, 249.75, 0)]
    )
    assert resolve("UniPC", SD1).options == {"order": 3, "solver_type": "bh1"}
    assert levels("LCM", 2)[1] == pytest.approx(schedule.sigma(19))
    fast = levels("DPM fast", 20)  # calls, three an interval
    assert len(fast) == 20 // 3 + 2 and fast[-1] == pytest.approx(schedule.sigma_min)


def test_comfyui() -> None:
    comfy = resolve("dpmpp_2m karras", SD1)
    assert (comfy.solver, comfy.spacing, comfy.start, comfy.timestep) == ("dpmpp_2m", "karras", "vp", "nearest")
    assert resolve("euler_ancestral", SD1).spacing == "normal"
    assert resolve("euler ddim_uniform", SD1).start == "sigma"  # it does not begin at the top
    assert (
        resolve("euler beta", SD1).spacing_options["index"]
        and "index" not in resolve("Euler Beta", SD1).spacing_options
    )
    assert resolve("uni_pc_bh2", SD1).options["solver_type"] == "bh2"
    assert len(presets.COMFYUI_SCHEDULES) == 9
    kl = levels("euler kl_optimal", 5), levels("Euler KL Optimal", 5)
    assert kl[0][-1] == 0.0 and kl[1][-1] == kl[0][-2] and len(kl[0]) == len(kl[1])


# mid-2026, but for cfgpp_ud10_ab, sa_solver and sa_solver_pece, of which no solver of ours is mathematically the same
COMFYUI = [
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0"),
    *("exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral"),
    *("dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde"),
    *("dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm"),
    *("lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral"),
    *("res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2"),
    *("seeds_3", "ddim", "uni_pc", "uni_pc_bh2"),
]


def test_the_names_of_comfyui() -> None:
    assert len(COMFYUI) == 45 - 3
    assert set(COMFYUI) == {*presets.COMFYUI_SAMPLERS, *presets.COMFYUI_ENDS}
    for name in COMFYUI:
        assert resolve(f"{name} karras", SD1).timestep == "nearest"
        assert name in NAMES
    for name in ("sa_solver karras", "sa_solver_pece", "sa_solver_pece karras"):  # `sa_solver` alone is diffusers'
        with pytest.raises(RequestError, match=r"did you mean .*sa_solver"):
            resolve(name, SD1)
    with pytest.raises(RequestError, match=r"sampler is 'cfgpp_ud10_ab'; (did you mean|there are) .*cfg_pp"):
        resolve("cfgpp_ud10_ab", SD1)


def test_comfyui_names_that_are_options_of_a_solver() -> None:
    heun, sde = resolve("exp_heun_2_x0", SD1), resolve("exp_heun_2_x0_sde", SD1)
    assert heun.solver == sde.solver == "seeds_2" and heun.options == {**sde.options, "eta": 0.0}
    assert resolve("deis", SD1).solver == "deis" and resolve("deis normal", SD1).solver == "deis_tab"
    assert resolve("DEIS", SD1).solver == "deis_tab"
    for name in ("dpmpp_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"):
        plain, gpu = resolve(f"{name} karras", SD1), resolve(f"{name}_gpu karras", SD1)
        assert replace(gpu, name=plain.name) == plain and gpu.noise.startswith("brownian")
    fast, ours = resolve("dpm_fast karras", SD1), resolve("dpm_fast", SD1)
    assert (fast.spacing, fast.spacing_options, fast.start) == (ours.spacing, ours.spacing_options, "vp")


def test_align_your_steps_of_forge() -> None:
    assert levels("Euler Align Your Steps 32", 32)[1] == pytest.approx(11.23951352)
    assert levels("Euler Align Your Steps GITS", 11)[1] == pytest.approx(4.617)
    assert levels("Euler Align Your Steps 11", 7) == levels("Euler Align Your Steps", 7)
    sampler = resolve("Euler Align Your Steps GITS", SD1, family="sdxl")
    assert sampler.spacing_options["table"] == "gits" and sampler.spacing_options["family"] == "sdxl"


def test_cfg_pp() -> None:
    """The solvers that ask for a pair, and A1111's scale: its 7.5 is the paper's 0.6."""
    asking = {name for name, solver in SOLVERS.items() if "cfg_pp" in getattr(solver, "keywords", {})}
    assert {row.name for row in TABLE if row.cfg_pp} == {*asking, "dpmpp_2m_cfg_pp"}
    assert resolve("DDIM CFG++", SD1).guidance_divisor == 12.5 and 7.5 / 12.5 == 0.6
    divided = [name for name in NAMES if resolve(name, SD1).guidance_divisor != 1.0]
    assert divided == ["DDIM CFG++"]


def test_restart_of_a1111_stays_karras() -> None:
    assert resolve("Restart", SD1).options == resolve("Restart Exponential", SD1).options == {"karras": True}
    assert resolve("Restart Exponential", SD1).spacing == "exponential"  # below 20 steps
    assert resolve("restart", SD1).options == {}


def test_few_step_models() -> None:
    for name, solver in (("turbo", "euler_a"), ("lightning", "euler"), ("lcm-lora", "lcm"), ("lcm", "lcm")):
        sampler = resolve(name, SD1)
        assert (sampler.name, sampler.solver, sampler.spacing) == (name, solver, "trailing")
        assert sampler.guidance_scale == 1.0 and sampler.steps == 4
    schedule = Schedule.from_config(resolve("lcm", SD1).schedule)
    assert levels("lcm", 4) == [*(schedule.sigma(t) for t in (999, 759, 499, 259)), 0.0]
    assert resolve("euler", SD1).steps is None


def test_align_your_steps_of_the_family() -> None:
    assert levels("Euler Align Your Steps", 11)[1] == pytest.approx(6.475)
    sampler = resolve("Euler Align Your Steps", SD1, family="sdxl")
    assert SPACINGS["ays"](Schedule.from_config(sampler.schedule), 11, **sampler.spacing_options)[1] == pytest.approx(
        6.315
    )


@pytest.mark.parametrize(
    ("name", "hint"), [("dpm++ 22m", "DPM\\+\\+ 2M"), ("eular", "euler"), ("DDIMSchedule", "DDIMScheduler")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"sampler is {name!r}".replace("+", "\\+") + f"; did you mean .*{hint}"):
        resolve(name, SD1)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        # an exact spelling is what it is, although A1111's Euler is not diffusers' (and ours)
        ("euler", "euler"),
        ("Euler", "Euler"),
        ("ddim", "ddim"),
        ("DDIM", "DDIM"),
        ("dpmpp_2m karras", "dpmpp_2m karras"),
        # then one that differs in case, then one that differs in separators, each of ours before diffusers', A1111's
        # and ComfyUI's
        ("EULER", "euler"),
        ("EULER A", "Euler a"),
        ("EULER_A", "euler_a"),
        ("Euler-a", "euler_a"),
        ("euler a karras", "Euler a Karras"),
        ("euler ancestral", "euler_ancestral"),
        ("DPM++ 2m karras", "DPM++ 2M Karras"),
        ("dpm++2m-SDE_Karras", "DPM++ 2M SDE Karras"),
        ("dpm++ 2m sgm_uniform", "DPM++ 2M SGM Uniform"),
        ("DPMPP 2M SDE", "dpmpp_2m_sde"),
        ("dpmpp-2m-karras", "dpmpp_2m karras"),
        ("ddim scheduler", "DDIMScheduler"),
        ("Uni PC", "unipc"),
        ("uni-pc-bh2", "uni_pc_bh2"),
        ("LCM_LoRA", "lcm-lora"),
        ("PLMS", "PLMS"),
        ("plms", "PLMS"),
    ],
)
def test_case_and_separators_of_a_name_do_not_matter(typed: str, name: str) -> None:
    """The name is the record's, so the same picture is drawn again whatever was typed."""
    assert Request(prompt="", sampler=typed).sampler == name
    assert resolve(typed, SD1) == resolve(name, SD1)


def test_names_that_differ_in_separators_alone_mean_the_same_within_a_program() -> None:
    """Otherwise a name that is typed in another way would silently mean one of them."""
    programs = (
        [*samplers.SOLVERS],
        [name for name in CLASSES if name not in samplers.SOLVERS],
        [name for name in PRESETS if PRESETS[name].counts.startswith("a1111")],
        [name for name in PRESETS if PRESETS[name].counts == "comfyui"],
        [*samplers.SPACINGS],
    )
    for names in programs:
        letters = [re.sub("[ _-]", "", name).lower() for name in names]
        assert names and len(set(letters)) == len(letters)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("Karras", "karras"),
        ("SGM Uniform", "sgm_uniform"),
        ("sgm-uniform", "sgm_uniform"),
        ("KL optimal", "kl_optimal"),
        ("Align Your Steps", "ays"),
        ("Uniform", "normal"),
        ("AYS", "ays"),
        ("lu", "lu"),
    ],
)
def test_case_and_separators_of_a_spacing_do_not_matter(typed: str, name: str) -> None:
    assert Request(prompt="", spacing=typed).spacing == name
    assert resolve("euler", SD1, typed) == resolve("euler", SD1, name)


def test_a_name_near_nothing_lists_them_all() -> None:
    with pytest.raises(RequestError, match="there are ddpm, ddim, pndm"):
        resolve("zzzzzzzz", SD1)
    with pytest.raises(RequestError, match="spacing is 'karas'; did you mean karras"):
        resolve("euler", SD1, "karas")


def test_a_spacing_that_a_solver_cannot_use() -> None:
    for name in ("dpm_adaptive", "DPM adaptive"):
        with pytest.raises(RequestError, match=r"spacing is 'karras', but .* chooses its own noise levels"):
            resolve(name, SD1, "karras")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sigmas": (1.0, 2.0)}, "sigmas is .* it must be 2 to 1001 falling noise levels"),
        ({"sigmas": (2.0, 2.0, 0.0)}, "sigmas is"),
        ({"sigmas": (2.0, float("nan"))}, "sigmas is"),
        ({"sigmas": (float("inf"), 0.0)}, "sigmas is"),
        ({"sigmas": (1.0, -0.1)}, "sigmas is"),
        ({"sigmas": (1.0,)}, "sigmas is"),
        ({"timesteps": (10, 500)}, "timesteps is .* falling timesteps"),
        ({"timesteps": ()}, "timesteps is"),
        ({"sigmas": (1.0, 0.0), "spacing": "karras"}, "sigmas and spacing are given; .* give only one"),
        ({"sigmas": (1.0, 0.0), "timesteps": (1,)}, "sigmas and timesteps are given"),
        ({"timesteps": (900, 500), "steps": 3}, "steps is 3 and timesteps has 2 steps; leave steps out"),
    ],
)
def test_a_list_that_is_no_list_of_levels(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        Request(prompt="", **fields)


@pytest.mark.parametrize(
    ("name", "flags", "key"),
    [
        ("pndm", {"skip_prk_steps": None}, "skip_prk_steps = None .the model's"),
        ("dpmpp_2m", {"algorithm_type": "sde"}, "algorithm_type = 'sde'"),
        ("deis", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver"),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
        ("euler", {"timestep_spacing": "middle"}, "timestep_spacing = 'middle'"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddpm", {"variance_type": "learned"}, "variance_type"),
        ("ddpm", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("ddpm", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("EDMEulerScheduler", {"sigma_schedule": "lu"}, "sigma_schedule = 'lu'"),
        (None, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        (None, {"_class_name": ["DDIMScheduler"]}, "_class_name = .'DDIMScheduler'"),
    ],
)
def test_what_is_not_supported_is_named(name: str | None, flags: dict[str, object], key: str) -> None:
    with pytest.raises(RequestError, match=key):
        resolve(name, SD1 | flags)


def test_pndm_starts_with_runge_kutta_unless_told() -> None:
    assert resolve("pndm", {}).options == {"midpoint": "pndm_midpoint"}  # the default of its class
    assert resolve("pndm", SD1).options == {"midpoint": None}
    schedule = Schedule.from_config(resolve("pndm", SD1).schedule)
    assert schedule.bind_options(resolve("pndm", {}).options)["midpoint"] == schedule.pndm_midpoint


def test_the_kinds_of_sa_solver() -> None:
    assert resolve("sa_solver", SD1).options["predict_x0"] is True
    assert resolve("sa_solver", SD1 | {"algorithm_type": "noise_prediction"}).options["predict_x0"] is False


def test_needs_no_torch() -> None:
    code = "import sys, mezzotint.samplers.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["Euler a", "DPM++ 2M Karras", "DDIM", "euler_ancestral", "dpmpp_2m karras", "dpm_2"])
def test_zero_snr_under_another_programs_name_is_that_programs(name: str) -> None:
    """Both set the last alpha_bar of the rescaled table to this number, and take sqrt((1 - a) / a) of it."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    root = np.sqrt(alphas)
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = 4.8973451890853435e-08
    theirs = np.sqrt((1 - rescaled) / rescaled)
    config = SD1 | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ours = Schedule.from_config(resolve(name, config).schedule)
    np.testing.assert_allclose(ours.sigmas, theirs, rtol=1e-12)
    assert ours.sigma_max == pytest.approx(4518.8, abs=0.05)
    assert Schedule.from_config(resolve("euler", config).schedule).sigma_max == pytest.approx(4096, rel=1e-6)
    if "arras" in name:  # k-diffusion's get_sigmas_karras between the ends of that table
        ends = theirs[-1] ** (1 / 7), theirs[0] ** (1 / 7)
        karras = [(ends[0] + k / 9 * (ends[1] - ends[0])) ** 7 for k in range(10)]
        np.testing.assert_allclose(levels(name, 10, config), [*karras, 0.0], rtol=1e-9)


def test_edm_levels_under_comfyuis_names_are_even_in_log_sigma() -> None:
    """Its table is exp(linspace(log sigma_min, log sigma_max)) for every model with EDM's preconditioning."""
    ours = Schedule.from_config(resolve("euler_ancestral", EDM).schedule)
    np.testing.assert_allclose(ours.sigmas, np.exp(np.linspace(math.log(0.002), math.log(60.0), 1000)), rtol=1e-9)
    assert resolve("euler", EDM).schedule.sigma_schedule == "karras"
