"""Whole runs against diffusers' schedulers, live, on a small random network: the same start, the same final latents.

The loop beside ours is that of diffusers' StableDiffusionPipeline. The network is nonlinear and deterministic; its
output follows x, the condition and the timestep (to well below one step), so that any two samplers end far apart.
Limit: 1e-4 relative in the final latents (DESIGN.md section 5); measured, 1e-6 to 6e-5.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.models.unet import Condition
from mezzotint.samplers import CLASSES, SCHEDULERS, resolve

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2

# scheduler_config.json as the hub has them
SD1 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD2 = SD1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = SD1 | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
CONFIGS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
SHAPE = (4, 9, 13)  # of 72x104 pixels


class Network(nn.Module):
    """Stands for a UNet: the same calls, a few thousand weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(8, width)
        self.context = nn.Linear(6, width)
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)
        self.calls = 0

    def keys_values(self, condition: Condition) -> list[tuple[Tensor, Tensor]]:
        keys = self.context(condition.context)
        return [(keys, keys)]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        condition: Condition,
        *,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        self.calls += 1
        keys, _ = (keys_values or self.keys_values(condition))[0]
        angle = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1) * 0.1 ** torch.arange(4)
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        hidden = self.conv_in(sample) + (time + keys.mean(1))[:, :, None, None]
        output: Tensor = self.conv_out(torch.tanh(hidden))
        return output


@pytest.fixture(scope="module")
def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network().requires_grad_(False)
    network.conv_out.weight.mul_(3.0)
    return network


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """diffusers logs every key that a class does not know."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


def conditions() -> tuple[Condition, Condition]:
    generator = torch.Generator().manual_seed(5)
    return (
        Condition(torch.randn((1, 7, 6), generator=generator) * 2),
        Condition(torch.randn((1, 7, 6), generator=generator) * 2),
    )


def theirs(
    network: Network,
    scheduler: Any,
    steps: int,
    guidance: float,
    seeds: list[int],
    rescale: float = 0.0,
    eta: float = 0.0,
) -> Tensor:
    """Final latents of StableDiffusionPipeline's loop."""
    conditional, unconditional = conditions()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.cat([torch.randn((1, *SHAPE), generator=generator) for generator in generators])
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in {"generator": generators, "eta": eta}.items() if key in accepted}
    both = Condition.cat([unconditional.repeat(len(seeds)), conditional.repeat(len(seeds))])
    for t in scheduler.timesteps:
        if guidance > 1:
            sample = scheduler.scale_model_input(torch.cat([x] * 2), t)
            empty, output = network(sample, t, both).chunk(2)
            combined = empty + guidance * (output - empty)
            if rescale:
                combined = rescale_noise_cfg(combined, output, rescale)
        else:
            combined = network(scheduler.scale_model_input(x, t), t, conditional.repeat(len(seeds)))
        x = scheduler.step(combined, t, x, **extra, return_dict=False)[0]
    return x


def ours(
    network: Network,
    name: str | None,
    config: dict[str, Any],
    steps: int,
    guidance: float,
    seeds: list[int],
    rescale: float = 0.0,
    eta: float | None = None,
    spacing: str | None = None,
    table: Any = None,
) -> Tensor:
    """Final latents as pipeline.py makes them; `table`: other alphas_cumprod than our own."""
    sampler = resolve(name, config, spacing)
    schedule = Schedule.from_config(sampler.schedule) if table is None else Schedule(table)
    prediction = PREDICTIONS[sampler.schedule.prediction_type]
    sigmas = SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)
    noise = SeededNoise(seeds, SHAPE)
    denoiser = Denoiser(network, schedule, prediction, conditions(), sampler.timestep)  # type: ignore[arg-type]
    denoise = guided(denoiser.outputs, prediction, guidance, rescale)
    x = noise.draw() * (sigmas[0] if sampler.start == "sigma" else math.sqrt(sigmas[0] ** 2 + 1))
    options = sampler.options if eta is None else sampler.options | {"eta": eta}
    for step in SOLVERS[sampler.solver](denoise, x, sigmas, noise, **options):
        x = step.x
    assert step.index == steps - 1 and step.sigma == sigmas[-1]
    return x / math.sqrt(1 + sigmas[-1] ** 2) if sampler.rescale_final else x


def reference(name: str, config: dict[str, Any], **flags: Any) -> Any:
    """diffusers' scheduler of our name, from a file with `flags`."""
    return getattr(diffusers, CLASSES[name].name).from_config(config | flags)


def apart(a: Tensor, b: Tensor) -> float:
    """Greatest difference, relative to the greatest value. NaN is far from everything."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


FLAGS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, family, {}) for name in SOLVERS for family in CONFIGS),
    *((name, "sd1", {"timestep_spacing": s}) for name in SOLVERS for s in ("leading", "linspace", "trailing")),
    *(
        (name, "sdxl", {"timestep_spacing": s, "use_karras_sigmas": True})
        for name in ("lms", "euler", "heun", "dpmpp_2m")
        for s in ("leading", "linspace", "trailing")
    ),
    *((name, "sd1", {"beta_schedule": s}) for name in SOLVERS for s in ("linear", "squaredcos_cap_v2")),
    *((name, "sd1", {"prediction_type": "sample"}) for name in ("ddpm", "ddim", "lms", "euler", "heun", "dpmpp_2m")),
    *((name, "sd1", {"set_alpha_to_one": True}) for name in ("ddim", "pndm")),
    *((name, "sd1", {"steps_offset": 0}) for name in ("ddim", "pndm", "ddpm")),
    *((name, "sd1", {"final_sigmas_type": "sigma_min"}) for name in ("euler", "dpmpp_2m")),
    ("dpmpp_2m", "sd1", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpmpp_2m", "sd1", {"final_sigmas_type": "sigma_min", "euler_at_final": True, "use_karras_sigmas": True}),
    *(
        (name, "sd2", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
        for name in ("lms", "euler", "euler_a", "heun", "dpmpp_2m")
    ),
]


def known_difference(name: str, family: str, flags: dict[str, Any]) -> bool:
    """Where diffusers is inconsistent with itself; each has its own test below."""
    return (name == "pndm" and family == "sd2") or (
        name in ("ddim", "pndm") and flags.get("timestep_spacing") == "linspace"
    )


@pytest.mark.parametrize(("name", "family", "flags"), [case for case in FLAGS if not known_difference(*case)])
def test_final_latents_are_those_of_diffusers(network: Network, name: str, family: str, flags: dict[str, Any]) -> None:
    config = CONFIGS[family] | flags
    # cosine and zero-SNR schedules start at sigma 20291 and 4096, which float32 holds to 1e-3 and 2e-4: diffusers steps
    # by adding sigma times a slope, so its first steps lose that much, and two steps are nothing else
    high = Schedule.from_config(resolve(name, config).schedule).sigma_max > 1000
    for steps, guidance in ((5 if high else 2, 7.5), (7, 1.0), (20, 7.5)):
        if name in ("ddim", "pndm") and flags.get("timestep_spacing") == "trailing" and steps == 7:
            continue  # see below
        expected = theirs(network, reference(name, config), steps, guidance, [3, 2**40])
        assert apart(ours(network, name, config, steps, guidance, [3, 2**40]), expected) < 1e-4


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_every_number_of_steps(network: Network, name: str, steps: int) -> None:
    expected = theirs(network, reference(name, SD1), steps, 7.5, [1])
    assert apart(ours(network, name, SD1, steps, 7.5, [1]), expected) < 1e-4


@pytest.mark.parametrize("family", CONFIGS)
def test_no_name_is_the_class_in_the_file(network: Network, family: str) -> None:
    config = CONFIGS[family]
    scheduler = getattr(diffusers, str(config["_class_name"])).from_config(config)
    assert apart(ours(network, None, config, 6, 7.5, [1]), theirs(network, scheduler, 6, 7.5, [1])) < 1e-4


def test_the_default_trap(network: Network) -> None:
    """SD1.5's file has no timestep_spacing: PNDM runs leading, Euler from the same file linspace."""
    assert resolve(None, SD1).spacing == "leading"
    assert resolve("euler", SD1).spacing == "linspace"
    expected = theirs(network, reference("euler", SD1), 8, 7.5, [1])
    assert apart(ours(network, "euler", SD1, 8, 7.5, [1]), expected) < 1e-4
    assert apart(ours(network, "euler", SD1, 8, 7.5, [1], spacing="leading"), expected) > 1e-2


@pytest.mark.parametrize("name", SOLVERS)
def test_another_spacing_is_that_of_the_class(network: Network, name: str) -> None:
    expected = theirs(network, reference(name, SDXL, timestep_spacing="trailing"), 10, 7.5, [1])
    assert apart(ours(network, name, SDXL, 10, 7.5, [1], spacing="trailing"), expected) < 1e-4
    if "use_karras_sigmas" in CLASSES[name].defaults:
        expected = theirs(network, reference(name, SDXL, use_karras_sigmas=True), 10, 7.5, [1])
        assert apart(ours(network, name, SDXL, 10, 7.5, [1], spacing="karras"), expected) < 1e-4


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_ddim_with_eta(network: Network, family: str, eta: float) -> None:
    config = CONFIGS[family]
    expected = theirs(network, reference("ddim", config), 10, 7.5, [1, 2], eta=eta)
    assert apart(ours(network, "ddim", config, 10, 7.5, [1, 2], eta=eta), expected) < 1e-4


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler_a"])
def test_guidance_rescale(network: Network, name: str, family: str) -> None:
    config = CONFIGS[family]
    expected = theirs(network, reference(name, config), 10, 7.5, [1, 2], rescale=0.7)
    assert apart(ours(network, name, config, 10, 7.5, [1, 2], rescale=0.7), expected) < 1e-4
    assert apart(ours(network, name, config, 10, 7.5, [1, 2]), expected) > 1e-2


def test_every_other_sampler_ends_elsewhere(network: Network) -> None:
    """Or the tests above would show nothing."""
    finals = {name: ours(network, name, SD1, 10, 7.5, [1]) for name in SOLVERS}
    for name, other in itertools.combinations(finals, 2):
        assert apart(finals[name], finals[other]) > 1e-3, (name, other)


@pytest.mark.parametrize("name", SOLVERS)
def test_sigmas_and_timesteps_are_those_of_diffusers(network: Network, name: str) -> None:
    variants = [{"timestep_spacing": s} for s in ("leading", "linspace", "trailing")]
    if "use_karras_sigmas" in CLASSES[name].defaults:
        variants += [flags | {"use_karras_sigmas": True} for flags in variants]
    for flags in variants:
        scheduler = reference(name, SD1, **flags)
        sampler = resolve(name, SD1 | flags)
        schedule = Schedule.from_config(sampler.schedule)
        denoiser = Denoiser(network, schedule, PREDICTIONS["epsilon"], conditions(), sampler.timestep)  # type: ignore[arg-type]
        for steps in (1, 2, 3, 10, 16, 30, 48, 99):
            scheduler.set_timesteps(steps)
            sigmas = SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)
            timesteps = [denoiser.timestep(sigma) for sigma in sigmas[:-1]]
            seen = dict.fromkeys(scheduler.timesteps.tolist())  # Heun and PNDM ask twice at some
            assert list(seen) == pytest.approx(list(dict.fromkeys(timesteps)), abs=2e-2)
            if hasattr(scheduler, "sigmas"):
                expected = scheduler.sigmas.tolist()
                expected = (
                    [*expected[:1:2], *expected[1::2]] if name == "heun" else expected
                )  # it repeats the inner ones
                assert sigmas == pytest.approx(expected, rel=1e-4)


def test_truncated_timesteps(network: Network) -> None:
    """What diffusers' DPMSolverMultistep makes of exponential sigmas: 999 becomes 998."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(SD1 | {"use_exponential_sigmas": True})
    schedule = Schedule.from_config(resolve("dpmpp_2m", SD1).schedule)
    denoiser = Denoiser(network, schedule, PREDICTIONS["epsilon"], conditions(), "truncated")  # type: ignore[arg-type]
    scheduler.set_timesteps(12)
    assert scheduler.timesteps[0] == 998
    assert [
        denoiser.timestep(sigma) for sigma in scheduler.sigmas.double().tolist()[:-1]
    ] == scheduler.timesteps.tolist()


def test_defaults_are_those_of_the_classes() -> None:
    for scheduler in SCHEDULERS:
        theirs = inspect.signature(getattr(diffusers, scheduler.name).__init__).parameters
        assert {key: theirs[key].default for key in scheduler.defaults} == scheduler.defaults
        optional = {"rescale_betas_zero_snr", "use_karras_sigmas", "set_alpha_to_one", "final_sigmas_type"}
        assert optional & set(theirs) <= set(scheduler.defaults), scheduler.name


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


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_terminal_snr_differs_by_the_cap(network: Network, name: str) -> None:
    """Their first alpha is exactly 0, ours 2**-24, as in their other classes."""
    config = SD2 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert 1e-5 < difference(network, name, config, 20) < 2e-3


@pytest.mark.parametrize("name", ["lms", "euler", "heun"])
def test_karras_differs_by_the_rounding_of_their_tables(network: Network, name: str) -> None:
    """Their float32 tables put a level up to 1e-3 of a timestep elsewhere; this network feels that, and only that."""
    config = SD2 | {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    scheduler = reference(name, config)
    table = scheduler.alphas_cumprod.double().numpy()
    expected = theirs(network, scheduler, 7, 7.5, [1])
    assert 1e-5 < apart(ours(network, name, config, 7, 7.5, [1]), expected) < 3e-4
    assert apart(ours(network, name, config, 7, 7.5, [1], table=table), expected) < 1e-5


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])
def test_clip_sample_is_not_done(network: Network, name: str) -> None:
    """It is meant for pixels in [-1, 1]; their pipelines for latents turn it off."""
    assert difference(network, name, SD1 | {"clip_sample": True}, 10) > 1e-2
