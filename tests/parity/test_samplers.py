"""Whole runs against diffusers' schedulers, live, on a small random network: the same start, the same final latents.

The rows are table.py's, in a short form: every class as SD 1's file has it at three numbers of steps, every other
variant at one. Limits, relative in the final latents: 1e-4 for runs as anybody makes them, which use our tables; and
what float32's rounding explains (tolerances.py) for the same runs through diffusers' own tables and timesteps.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import diffusers
import pytest
import torch
from tolerances import EPS, ROUNDINGS

from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.samplers.diffusers_classes import CLASSES, SCHEDULERS
from mezzotint.samplers.names import resolve
from table import (
    LIMITS,
    NAMES,
    RUNS,
    SEEDS,
    TWO_CALLS,
    USES,
    Network,
    Variant,
    alone,
    conditions,
    known,
    ours,
    reference,
    same_tables,
    starts_high,
    theirs,
    variants,
)
from tiny import SCHEDULER_CONFIGS, apart

SD1, SD2, SDXL = SCHEDULER_CONFIGS.values()
pytestmark = [  # diffusers with numpy 2, and its Brownian path asked a digit beyond its end
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types:FutureWarning"),
]


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.seeded()


VARIANTS = [variant for name in NAMES for variant in variants(name)]


# Levels between the timesteps follow the table: that of diffusers, in float32, puts them up to 1e-3 of a timestep
# elsewhere, and this network's output turns by as much (its angle is the timestep itself). Guidance and the other
# frequencies leave a third of it.
FOLLOWS_TABLE = 3e-4


def between(variant: Variant) -> bool:
    """Whether the spacing puts levels between the timesteps."""
    return any(variant.flags.get(flag) for flag in USES)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not known(v)], ids=str)
def test_final_latents_are_those_of_diffusers(network: Network, variant: Variant) -> None:
    runs = RUNS if (variant.family, variant.flags) == ("sd1", {}) else ((5, 1.0 if variant.flags else 7.5),)
    if not starts_high(variant) or variant.name in TWO_CALLS:
        assert alone(network, variant, runs) < LIMITS.get(variant.name, FOLLOWS_TABLE if between(variant) else 1e-4)
    if "sigma_data" not in CLASSES[variant.name].defaults:
        for steps, guidance in runs:
            rounding = same_tables(network, variant, max(steps, 7) if starts_high(variant) else steps, guidance)
            assert rounding.apart < rounding.limit
            assert rounding.timesteps < ROUNDINGS * EPS * 1000


@pytest.mark.parametrize("variant", [v for v in VARIANTS if known(v)], ids=str)
def test_known_differences_are_differences(network: Network, variant: Variant) -> None:
    """Or diffusers has become consistent, and the table says too little."""
    try:
        assert alone(network, variant, RUNS[1:]) > 1e-4
    except UnboundLocalError:
        assert "UnboundLocalError" in known(variant)


@pytest.mark.parametrize("name", NAMES)
def test_one_step(network: Network, name: str) -> None:
    assert alone(network, Variant(name, "sdxl", {}), ((1, 7.5),)) < 1e-4


def test_the_table_has_every_class() -> None:
    family = {scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers}
    more = ("LCM", "TCD", "SASolver", "EDMDPMSolverMultistep")
    assert {CLASSES[name].name for name in NAMES} == family | {f"{name}Scheduler" for name in more}
    assert len(family) == 15


@pytest.mark.parametrize("family", SCHEDULER_CONFIGS)
def test_no_name_is_the_class_in_the_file(network: Network, family: str) -> None:
    config = SCHEDULER_CONFIGS[family]
    scheduler = getattr(diffusers, str(config["_class_name"])).from_config(config)
    assert apart(ours(network, None, config, 6, 7.5, [1]), theirs(network, scheduler, 6, 7.5, [1])) < 1e-4


def test_the_default_trap(network: Network) -> None:
    """SD1.5's file has no timestep_spacing: PNDM runs leading, Euler from the same file linspace."""
    assert resolve(None, SD1).spacing == "leading"
    assert resolve("euler", SD1).spacing == "linspace"
    expected = theirs(network, reference("euler", SD1), 8, 7.5, [1])
    assert apart(ours(network, "euler", SD1, 8, 7.5, [1]), expected) < 1e-4
    assert apart(ours(network, "euler", SD1, 8, 7.5, [1], spacing="leading"), expected) > 1e-2


KEYS = {
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}


@pytest.mark.parametrize("name", ["euler", "dpm2", "dpmpp_2s", "dpmpp_2m", "unipc", "deis", "sa_solver"])
def test_another_spacing_is_that_of_the_class(network: Network, name: str) -> None:
    """Also where the file itself asks for one."""
    for spacing, keys in KEYS.items():
        if keys.keys() <= CLASSES[name].defaults.keys():
            expected = theirs(network, reference(name, SDXL, **keys), 6, 7.5, [1])
            for config in (SDXL, SDXL | {"use_karras_sigmas": True}):
                assert apart(ours(network, name, config, 6, 7.5, [1], spacing=spacing), expected) < 1e-4


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta(network: Network, name: str, family: str, eta: float) -> None:
    config = SCHEDULER_CONFIGS[family]
    expected = theirs(network, reference(name, config), 10, 7.5, [1, 2], eta=eta)
    assert apart(ours(network, name, config, 10, 7.5, [1, 2], eta=eta), expected) < 1e-4


@pytest.mark.parametrize("family", SCHEDULER_CONFIGS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler_a"])
def test_guidance_rescale(network: Network, name: str, family: str) -> None:
    config = SCHEDULER_CONFIGS[family]
    expected = theirs(network, reference(name, config), 10, 7.5, [1, 2], rescale=0.7)
    assert apart(ours(network, name, config, 10, 7.5, [1, 2], rescale=0.7), expected) < 1e-4
    assert apart(ours(network, name, config, 10, 7.5, [1, 2]), expected) > 1e-2


def test_every_other_sampler_gives_other_latents(network: Network) -> None:
    """Or the tests above would show nothing."""
    finals = {name: ours(network, name, SD1, 10, 7.5, [1]) for name in NAMES}
    for name, other in itertools.combinations(finals, 2):
        assert apart(finals[name], finals[other]) > 1e-3, (name, other)


@pytest.mark.parametrize("name", NAMES)
def test_sigmas_and_timesteps_are_those_of_diffusers(network: Network, name: str) -> None:
    for keys in KEYS.values():
        if not keys.keys() <= CLASSES[name].defaults.keys() or (name == "dpm2_a" and keys == KEYS["karras"]):
            continue
        scheduler, sampler = reference(name, SD1, **keys), resolve(name, SD1 | keys)
        schedule = Schedule.from_config(sampler.schedule)
        for steps in (1, 2, 3, 10, 16, 30):
            scheduler.set_timesteps(steps)
            sigmas = SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)
            denoiser = Denoiser(network, schedule, PREDICTIONS["epsilon"], conditions(), sampler.timestep, sigmas)  # type: ignore[arg-type]
            timesteps = [denoiser.timestep(sigma) for sigma in sigmas[:-1]]
            seen = scheduler.timesteps.tolist()  # where each step has two, those of its beginning
            seen = [seen[0], *seen[2::2]] if name in ("dpm2", "dpm2_a", "dpmpp_sde") else seen
            assert list(dict.fromkeys(seen)) == pytest.approx(list(dict.fromkeys(timesteps)), abs=2e-2)
            if hasattr(scheduler, "sigmas"):
                expected = list(dict.fromkeys(scheduler.sigmas.tolist()))  # some repeat the inner ones
                assert list(dict.fromkeys(sigmas)) == pytest.approx(expected, rel=1e-4)


def test_defaults_are_those_of_the_classes() -> None:
    for scheduler in SCHEDULERS:
        if not scheduler.name:
            continue
        theirs = inspect.signature(getattr(diffusers, scheduler.name).__init__).parameters
        assert {key: theirs[key].default for key in scheduler.defaults} == scheduler.defaults
        # what would change latents and is not read
        ignored = {
            *("self", "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
            *(
                "flow_shift",
                "time_shift_type",
                "noise_sampler_seed",
                "timestep_scaling",
                "shift_terminal",
                "pndm_order",
            ),
        }
        consistency = {"timestep_spacing", "steps_offset", "set_alpha_to_one"}  # kept there, and unused
        ignored |= consistency if scheduler.key in ("lcm", "tcd") else set()
        assert set(theirs) - ignored <= set(scheduler.defaults), scheduler.name


# ---- where diffusers is inconsistent with itself: how far apart the two are ------------------------------------------


def difference(network: Network, name: str, config: dict[str, Any], steps: int) -> float:
    return apart(
        ours(network, name, config, steps, 7.5, [1]), theirs(network, reference(name, config), steps, 7.5, [1])
    )


def test_pndm_with_v_prediction_differs(network: Network) -> None:
    """diffusers extrapolates the raw v, whose weight changes along the run, not the noise estimate."""
    assert 1e-2 < difference(network, "pndm", SD2, 20) < 0.2


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_linspace_differs_where_the_step_is_assumed(network: Network, name: str) -> None:
    """diffusers steps to t - T // n, which is not the next timestep of its list."""
    assert 1e-2 < difference(network, name, SD1 | {"timestep_spacing": "linspace"}, 20) < 0.5


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_trailing_differs_when_the_steps_do_not_divide(network: Network, name: str) -> None:
    """As above; where they divide, the two agree."""
    config = SD1 | {"timestep_spacing": "trailing"}
    assert 1e-3 < difference(network, name, config, 7) < 5e-2
    assert difference(network, name, config, 8) < 1e-4


def test_trailing_makes_a_step_too_many_for_some_numbers() -> None:
    """numpy's arange gives 62 timesteps for 61 steps, down to -1."""
    scheduler = reference("euler", SD1, timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
    sampler = resolve("euler", SD1, "trailing")
    assert len(SPACINGS["trailing"](Schedule.from_config(sampler.schedule), 61)) == 62  # 61 steps and the end


@pytest.mark.parametrize("name", ["ddim", "ddpm", "tcd"])
def test_zero_terminal_snr_differs_by_the_cap(network: Network, name: str) -> None:
    """Their first alpha is exactly 0, ours 2**-24, as in their other classes."""
    config = SD2 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert 1e-5 < difference(network, name, config, 20) < 2e-3


@pytest.mark.parametrize("name", ["lms", "euler", "heun"])
def test_karras_differs_by_the_rounding_of_their_tables(network: Network, name: str) -> None:
    """Their float32 tables shift a level by up to 1e-3 of a timestep, which is all that this network depends on."""
    config = SD2 | {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    scheduler = reference(name, config)
    table = scheduler.alphas_cumprod.double().numpy()
    expected = theirs(network, scheduler, 7, 7.5, [1])
    assert 1e-5 < apart(ours(network, name, config, 7, 7.5, [1]), expected) < 3e-4
    assert apart(ours(network, name, config, 7, 7.5, [1], table=table), expected) < 1e-5


def test_dpm2_differs_by_the_same_in_two_steps(network: Network) -> None:
    """Its midpoint lies between two timesteps."""
    scheduler = reference("dpm2", SD2)
    table = scheduler.alphas_cumprod.double().numpy()
    expected = theirs(network, scheduler, 2, 7.5, [1])
    assert 1e-5 < apart(ours(network, "dpm2", SD2, 2, 7.5, [1]), expected) < 5e-4
    assert apart(ours(network, "dpm2", SD2, 2, 7.5, [1], table=table), expected) < 1e-5


def test_dpm2_a_under_karras_has_two_timesteps_for_one_level() -> None:
    """Its midpoint is the next level; diffusers tells the network the rounded timestep of the one, not of the other."""
    scheduler = reference("dpm2_a", SD1, use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    middle, level = scheduler.timesteps[1:3].tolist()
    assert middle == pytest.approx(785.954, abs=1e-2) and level == 786
    assert resolve("dpm2_a", SD1, "karras").timestep == "interpolated"


@pytest.mark.parametrize(("name", "config", "steps"), [("dpm2_a", SD1, 20), ("dpmpp_3m_sde", SDXL, 50)])
def test_their_float32_rounding(network: Network, name: str, config: dict[str, Any], steps: int) -> None:
    """They subtract what is nearly the same, squares or exponentials. Ours is nearer to a run in float64."""
    scheduler = reference(name, config)
    table = scheduler.alphas_cumprod.double().numpy()
    exact = ours(copy.deepcopy(network).double(), name, config, steps, 7.5, SEEDS, table=table, dtype=torch.float64)
    assert 1e-4 < apart(theirs(network, scheduler, steps, 7.5, SEEDS).double(), exact) < LIMITS[name]
    assert apart(ours(network, name, config, steps, 7.5, SEEDS, table=table).double(), exact) < 2e-5


@pytest.mark.parametrize(
    ("name", "flags", "steps"),
    [
        ("unipc", {"solver_type": "bh1"}, 20),
        ("unipc", {"lower_order_final": False}, 20),
        ("dpm2_a", {"beta_schedule": "squaredcos_cap_v2"}, 7),
        ("dpmpp_3m", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 20),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, 20),
    ],
)
def test_what_is_nan_there_is_a_picture_here(network: Network, name: str, flags: dict[str, Any], steps: int) -> None:
    """A step to level 0 that is not first order, third order over a step of no length, the root of a rounding error."""
    config = SD1 | flags
    assert not theirs(network, reference(name, config), steps, 7.5, [1]).isfinite().all()
    assert ours(network, name, config, steps, 7.5, [1]).isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "lcm"])
def test_clip_sample_is_not_done(network: Network, name: str) -> None:
    """It is meant for pixels in [-1, 1]; their pipelines for latents turn it off."""
    assert difference(network, name, SD1 | {"clip_sample": True}, 10) > 1e-2


# ---- EDM -------------------------------------------------------------------------------------------------------------


def test_an_edm_model_keeps_its_preconditioning_under_any_solver(network: Network) -> None:
    """Their euler has no such model; ours must be EDMEuler's where the levels are the same."""
    edm = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 60.0, "prediction_type": "v_prediction"}
    own = ours(network, None, edm, 9, 7.5, [1])
    assert apart(own, theirs(network, reference("EDMEulerScheduler", edm), 9, 7.5, [1])) < 1e-4
    sampler = resolve("Euler Karras", edm)
    assert sampler.timestep == "edm" and sampler.schedule.sigma_data == 0.5
    assert apart(ours(network, "Euler Karras", edm, 9, 7.5, [1]), own) < 1e-3  # but for the start, noise * sigma
    assert apart(ours(network, "heun", edm, 60, 1.0, [1]), ours(network, "dpmpp_2m", edm, 120, 1.0, [1])) < 2e-2
