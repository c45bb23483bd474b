"""The parity table: every scheduler class of the SD family in the configurations that people use, against diffusers.

    python tests/parity/table.py [--alone] [name or class ...]

It prints Markdown, a row for each variant. "alone": final latents of the sampler on a small fixed network, greatest
relative difference over 4, 7 and 20 steps. "picture": whole pipelines on the small random models of tiny.py, two
guided pictures of 72x104 in 5 steps: latents, pixels (greatest, of 255) and their mean. The rows are those of
test_samplers.py; `known` says where the two are meant to differ, and docs/fidelity.md why.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from tolerances import rounding_of_run
from torch import Tensor, nn

import pictures
import tiny
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.noise import BrownianNoise, SeededNoise
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS, Noise
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.models.unet import Condition
from mezzotint.samplers.diffusers_classes import CLASSES, SCHEDULERS
from mezzotint.samplers.names import resolve
from tiny import apart

SHAPE = (4, 9, 13)  # of 72x104 pixels
SEEDS = [3, 2**40]


class Variant(NamedTuple):
    """Our name of a scheduler, and what its configuration says beyond the family's file."""

    name: str
    family: str
    flags: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return tiny.SCHEDULER_CONFIGS[self.family] | self.flags

    def __str__(self) -> str:
        return ", ".join([self.name, self.family, *(f"{key}={value}" for key, value in self.flags.items())])


NAMES = [scheduler.key for scheduler in SCHEDULERS if scheduler.name]
_ENDS = {"final_sigmas_type": "sigma_min"}
USES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
NO_SAMPLE = ("pndm", "euler_a", "dpm2", "dpm2_a", "dpmpp_sde")  # these refuse x0, or would: raw outputs are added up


def variants(name: str) -> Iterator[Variant]:
    """All of one scheduler: each family's file, and with SD 1's what its class has a key for."""
    for family in tiny.SCHEDULER_CONFIGS:
        yield Variant(name, family, {})
    scheduler = CLASSES[name]
    has = scheduler.defaults
    if scheduler.flags:  # the class has a name of its own
        return
    spaced = [{"timestep_spacing": s} for s in ("leading", "linspace", "trailing") if "timestep_spacing" in has]
    flag_sets: list[dict[str, Any]] = [*spaced, *([{**spaced[0], "steps_offset": 0}] if spaced else [])]
    for flag in USES:
        if flag in has:  # where they range over the whole table, what they are laid over does not matter
            flag_sets += [{**s, flag: True} for s in (spaced if scheduler.points == "n" else [{}])]
            flag_sets += [{flag: True, "final_sigmas_type": "sigma_min"}] if "final_sigmas_type" in has else []
    if "beta_schedule" in has:
        flag_sets += [{"beta_schedule": s} for s in ("linear", "squaredcos_cap_v2")]
        flag_sets += [{"prediction_type": "sample"}] if name not in NO_SAMPLE else []
    flag_sets += [{"final_sigmas_type": "sigma_min"}] if "final_sigmas_type" in has else []
    flag_sets += [{"set_alpha_to_one": True}] if "set_alpha_to_one" in has else []
    flag_sets += [{"skip_prk_steps": False}] if "skip_prk_steps" in has else []
    for order, *types in itertools.product((1, 2, 3), *scheduler.choices.values()):
        if "solver_order" in has:
            flags = {"solver_order": order, **dict(zip(scheduler.choices, types, strict=True))}
            flag_sets += [
                flags | ({} if flags.get("algorithm_type", "++")[-1] in "+s" else {"final_sigmas_type": "sigma_min"})
            ]
    if "lower_order_final" in has:
        lower = {"lower_order_final": False}
        flag_sets += [
            lower,
            *({**lower, "solver_order": order, **_ENDS} for order in (2, 3) if _ENDS.keys() <= has.keys()),
        ]
    flag_sets += [{"euler_at_final": True, **_ENDS}] if "euler_at_final" in has else []
    flag_sets += [{"predict_x0": False, **_ENDS}, {"disable_corrector": [0, 2]}] if "predict_x0" in has else []
    if "predictor_order" in has:
        orders = ((1, 1), (1, 3), (3, 1), (3, 3), (2, 4))
        flag_sets += [{"predictor_order": p, "corrector_order": c} for p, c in orders]
        flag_sets += [{"algorithm_type": "noise_prediction"}]
    flag_sets += [{"sigma_schedule": "exponential"}, {"sigma_data": 1.0}] if "sigma_data" in has else []
    for flags in flag_sets:
        yield Variant(name, "sd1", flags)
    if "rescale_betas_zero_snr" in has:
        yield Variant(name, "sd2", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})


# Where diffusers' own formulas lose digits in float32, this much; else 1e-4.
LIMITS = {"dpm2_a": 2e-3, "dpmpp_3m_sde": 3e-4}


def known(variant: Variant) -> str:
    """Why the two differ, or cannot be compared, where they do; docs/fidelity.md has a row for each, and a test."""
    name, family, flags = variant
    spacing = flags.get("timestep_spacing")
    zero = flags.get("final_sigmas_type", "zero") == "zero"
    if name == "pndm" and family == "sd2":
        return "raw v is extrapolated"
    if name in ("ddim", "pndm") and spacing in ("linspace", "trailing") and len(flags) == 1:
        return "the next timestep is assumed"
    if name in ("ddim", "ddpm", "tcd") and "rescale_betas_zero_snr" in flags:
        return "first alpha exactly 0"
    if name == "dpm2_a" and "use_karras_sigmas" in flags:
        return "one level, two timesteps"
    if name == "dpm2_a" and flags.get("beta_schedule") == "squaredcos_cap_v2":
        return "NaN there"
    if name == "dpmpp_2s" and list(flags.values()) == [3, "heun", "sde-dpmsolver++"]:
        return "a sign is wrong there"
    if name == "unipc" and zero and (flags.get("solver_type") == "bh1" or "lower_order_final" in flags):
        return "NaN there"
    if flags.get("solver_order") == 3:
        edm = name == "EDMDPMSolverMultistepScheduler"
        if flags.get("algorithm_type") == ("sde-dpmsolver++" if edm else "sde-dpmsolver"):
            return "stops with an UnboundLocalError there"
        if edm and "lower_order_final" in flags:
            return "NaN there"
    return ""


# ---- the sampler alone -----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Stands for a UNet: the same calls, a few hundred weights.

    Nonlinear and deterministic; its output follows x, the condition and the timestep (to well below one step), so that
    any two samplers end far apart.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(8, width)
        self.context = nn.Linear(6, width)
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    @classmethod
    def seeded(cls) -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = cls().requires_grad_(False)
        network.conv_out.weight.mul_(3.0)
        return network

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
        timestep_cond: None = None,
    ) -> Tensor:
        keys, _ = (keys_values or self.keys_values(condition))[0]
        angle = torch.as_tensor(timestep).to(sample.dtype).reshape(-1, 1) * 0.1 ** torch.arange(4)
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        hidden = self.conv_in(sample) + (time + keys.mean(1))[:, :, None, None]
        output: Tensor = self.conv_out(torch.tanh(hidden))
        return output


def conditions() -> tuple[Condition, Condition]:
    generator = torch.Generator().manual_seed(5)
    return (
        Condition(torch.randn((1, 7, 6), generator=generator) * 2),
        Condition(torch.randn((1, 7, 6), generator=generator) * 2),
    )


def theirs(
    network: nn.Module,
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
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = seeds
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
    network: nn.Module,
    name: str | None,
    config: dict[str, Any],
    steps: int,
    guidance: float,
    seeds: list[int],
    rescale: float = 0.0,
    eta: float | None = None,
    spacing: str | None = None,
    table: Any = None,
    dtype: torch.dtype = torch.float32,
    fresh: Noise | None = None,
) -> Tensor:
    """Final latents as pipeline.py makes them; `table`: other alphas_cumprod than our own. dtype: of x."""
    sampler = resolve(name, config, spacing)
    schedule = Schedule.from_config(sampler.schedule) if table is None else Schedule(table)
    prediction = Prediction.from_config(sampler.schedule)
    sigmas = SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)
    noise = SeededNoise(seeds, SHAPE)
    denoiser = Denoiser(network, schedule, prediction, conditions(), sampler.timestep, sigmas)  # type: ignore[arg-type]
    denoise = guided(denoiser.outputs, prediction, guidance, rescale)
    x = noise.draw().to(dtype) * (sigmas[0] if sampler.start == "sigma" else math.sqrt(sigmas[0] ** 2 + 1))
    options = schedule.bind_options(sampler.options) | ({} if eta is None else {"eta": eta})
    if fresh is None and sampler.noise != "seeded":
        fresh = BrownianNoise(seeds, SHAPE, sigmas, midpoints=sampler.noise == "brownian midpoints")
    for step in SOLVERS[sampler.solver](denoise, x, sigmas, fresh or noise, **options):
        x = step.x
    assert step.index == steps - 1 and step.sigma == sigmas[-1]
    return x / math.sqrt(1 + sigmas[-1] ** 2) if sampler.rescale_final else x


def reference(name: str, config: dict[str, Any], **flags: Any) -> Any:
    """diffusers' scheduler of our name, from a file with `flags`."""
    scheduler = CLASSES[name]
    cls = getattr(diffusers, scheduler.name)
    every = cls.set_timesteps
    if "num_train_timesteps" in inspect.signature(every).parameters:  # made with all 1000, which takes half a second
        with mock.patch.object(cls, "set_timesteps", lambda self, steps, *rest: every(self, 2)):
            return cls.from_config(config | flags | dict(scheduler.flags))
    return cls.from_config(config | flags | dict(scheduler.flags))


RUNS = ((4, 7.5), (7, 1.0), (20, 7.5))  # steps, guidance


# Two calls a step, the second at the next level (of dpm2_a at the root of sigma * sigma_down = sigma_next^2, the same)
# or at the root of both: sigma / sigma_lower is this power of sigma / sigma_next.
TWO_CALLS = {"heun": 1.0, "dpm2_a": 1.0, "dpm2": 0.5, "dpmpp_sde": 0.5}


class Recorded(nn.Module):
    """The network, which records the timesteps that it is called with, or is called with those of another run."""

    def __init__(self, network: Network, instead: Sequence[float] = ()) -> None:
        super().__init__()
        self.network = network
        self.keys_values = network.keys_values
        self.timesteps: list[float] = []
        self.instead = instead

    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        timestep = torch.as_tensor(timestep)
        call = len(self.timesteps)
        self.timesteps.append(float(timestep.flatten()[0]))
        if self.instead:
            timestep = torch.full_like(timestep, self.instead[call], dtype=torch.float32)
        output: Tensor = self.network(sample, timestep, *args, **kwargs)
        return output


class Rounding(NamedTuple):
    """Two runs through the same tables."""

    apart: float  # final latents
    limit: float
    timesteps: float  # greatest difference between timesteps at which the network is called


def same_tables(network: Network, variant: Variant, steps: int, guidance: float) -> Rounding:
    """Compare with a run through diffusers' own float32 numbers, so that nothing is left but rounding.

    These are its table of alphas; the timesteps that it tells the network, which between two of the table it
    interpolates in float32 (this network turns by the timestep itself); and for dpmpp_sde its noise: a Brownian path
    moves by the root of what its time is off by, so the rounding of a level, 1e-7 of it, is 3e-4 of the noise.
    """
    scheduler = reference(variant.name, variant.config)
    table = scheduler.alphas_cumprod.double().numpy()
    table[table == 0.0] = 2**-24  # zero terminal SNR, as most of their classes cap it
    sampler = resolve(variant.name, variant.config)
    sigmas = SPACINGS[sampler.spacing](Schedule(table), steps, **sampler.spacing_options)
    sizes: list[float] = []
    noises: list[Tensor] = []
    step, increment = scheduler.step, BrownianTreeNoiseSampler.__call__

    @functools.wraps(step)
    def record_size(output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        sizes.append(float(sample.abs().max()))
        return step(output, timestep, sample, **kwargs)

    def record_noise(sampler: Any, *levels: Any) -> Tensor:
        noises.append(increment(sampler, *levels))
        return noises[-1]

    scheduler.step = record_size
    first = Recorded(network)
    with mock.patch.object(BrownianTreeNoiseSampler, "__call__", record_noise):
        expected = theirs(first, scheduler, steps, guidance, SEEDS)
    second = Recorded(network, first.timesteps)
    draws = iter(noises)
    fresh = (lambda *_: next(draws)) if noises else None
    found = ours(second, variant.name, variant.config, steps, guidance, SEEDS, table=table, fresh=fresh)
    assert len(first.timesteps) == len(second.timesteps)
    power = TWO_CALLS.get(variant.name)
    falls = [(sigma / lower) ** power for sigma, lower in pairwise(sigmas) if lower > 0.0] if power else []
    return Rounding(
        apart(found, expected),
        rounding_of_run([*sizes, float(expected.abs().max())], falls),
        max(abs(a - b) for a, b in zip(first.timesteps, second.timesteps, strict=True)),
    )


def starts_high(variant: Variant) -> bool:
    """Whether the schedule (cosine, or of zero terminal SNR) starts above sigma 1000, which float32 holds to 1e-4."""
    return Schedule.from_config(resolve(variant.name, variant.config).schedule).sigma_max > 1000


def alone(network: Network, variant: Variant, runs: Sequence[tuple[int, float]] = RUNS) -> float:
    """How far apart the final latents are at most."""
    # cosine and zero-SNR schedules start at sigma 20291 and 4096, which float32 holds to 1e-3 and 2e-4: diffusers steps
    # by adding sigma times a slope, so its first steps lose that much, and few steps are nothing else
    high = starts_high(variant)
    return max(
        apart(
            ours(network, variant.name, variant.config, *run, SEEDS),
            theirs(network, reference(variant.name, variant.config), *run, SEEDS),  # new: some remember the last run
        )
        for run in ((max(steps, 7) if high else steps, guidance) for steps, guidance in runs)
    )


def picture(pair: pictures.Pair, variant: Variant) -> tuple[float, int, float]:
    """Whole pictures of both: latents, greatest pixel, mean pixel."""
    request = pictures.fields(sampler=variant.name, count=2)
    flags = {key: value for key, value in variant.flags.items() if key != "steps_offset"}  # the pipeline's is always 1
    own = pair.ours.scheduler_config
    pair.ours.scheduler_config = own | variant.flags
    try:
        return pictures.apart(pictures.ours(pair, request), pictures.theirs(pair, request, **flags))
    finally:
        pair.ours.scheduler_config = own


def main(wanted: list[str]) -> None:
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    network = Network.seeded()
    pairs = {} if "--alone" in wanted else pictures.build(Path(tempfile.mkdtemp()))
    print("| variant | alone | picture: latents | greatest pixel | mean pixel | known difference |")
    print("|---|---|---|---|---|---|")
    for name in [CLASSES[name].key for name in wanted if name != "--alone"] or NAMES:
        for variant in variants(name):
            try:
                cells = [f"{alone(network, variant):.1e}"]
                if pairs:
                    latents, greatest, mean = picture(pairs[variant.family], variant)
                    cells += [f"{latents:.1e}", f"{greatest}/255", f"{mean:.4f}/255"]
            except (AssertionError, UnboundLocalError):
                cells = []
            print("|", " | ".join([str(variant), *cells, *[""] * (4 - len(cells)), known(variant)]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
