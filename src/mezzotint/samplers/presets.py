"""The samplers and schedules of A1111 (with Forge) and ComfyUI, as tables. No torch here.

Both run k-diffusion's solvers on the model's table of noise levels, interpolated in log sigma. A1111 starts from
sigma * noise and passes fractional timesteps to the network. ComfyUI starts from sqrt(sigma^2 + 1) * noise if the run
begins at the highest level, and passes the nearest integer timestep. Names that are missing here have no equivalent
among our solvers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mezzotint.samplers.sampler import NoiseKind, Sampler

Schedules = dict[str, tuple[str, dict[str, Any]]]  # the program's name: (spacing, its options)


@dataclass(frozen=True)
class Preset:
    """A sampler of A1111 or ComfyUI.

    Attributes:
        solver: Our solver.
        schedule: The default schedule, A1111's "Automatic".
        options: Options of the solver.
        points: "n+1" for samplers that space one more level and drop the lowest ("discard the penultimate sigma").
        noise: See `Sampler`.
        last: See `diffusion.spacing`.
    """

    solver: str
    schedule: str
    options: dict[str, Any] = field(default_factory=dict)
    points: Literal["n", "n+1"] = "n"
    noise: NoiseKind = "seeded"
    last: float | str = "zero"


# Both programs keep a last alpha_bar of zero at this value (sigma 4518.8), and have EDM's levels evenly in log sigma.
PRESET_SCHEDULE = {"terminal_alpha": 4.8973451890853435e-08, "sigma_schedule": "exponential"}
_WHOLE_ORDER = {"lower_order_final": False}  # k-diffusion never lowers the order
_HEUN = {**_WHOLE_ORDER, "solver_type": "heun"}
_EXP_HEUN: dict[str, Any] = {"nodes": (1.0,), "solver_type": "logrho"}

A1111_SCHEDULES: Schedules = {
    "Uniform": ("normal", {}),
    "Karras": ("karras", {}),
    "Exponential": ("exponential", {}),
    "Polyexponential": ("polyexponential", {}),
    "SGM Uniform": ("sgm_uniform", {}),
    "KL Optimal": ("kl_optimal", {"endpoint": False, "last": "sigma_min"}),
    "Align Your Steps": ("ays", {}),
    "Simple": ("simple", {}),
    "Normal": ("normal", {}),
    "DDIM": ("ddim_uniform", {}),
    "Beta": ("beta", {}),
    "Turbo": ("trailing", {"round_last": True}),  # Forge, like the next three
    "Align Your Steps 11": ("ays", {}),
    "Align Your Steps 32": ("ays", {"table": "32"}),
    "Align Your Steps GITS": ("ays", {"table": "gits"}),
}
A1111_SAMPLERS = {
    "Euler a": Preset("euler_a", "Uniform"),
    "Euler": Preset("euler", "Uniform"),
    "LMS": Preset("lms", "Uniform"),
    "Heun": Preset("heun", "Uniform"),
    "DPM2": Preset("dpm2", "Karras", points="n+1"),
    "DPM2 a": Preset("dpm2_a", "Karras", points="n+1"),
    "DPM++ 2S a": Preset("dpmpp_2s_a", "Karras"),
    "DPM++ 2M": Preset("dpmpp_2m", "Karras", _WHOLE_ORDER),
    "DPM++ SDE": Preset("dpmpp_sde", "Karras", noise="brownian midpoints"),
    "DPM++ 2M SDE": Preset("dpmpp_2m_sde", "Exponential", _WHOLE_ORDER, noise="brownian"),
    "DPM++ 2M SDE Heun": Preset("dpmpp_2m_sde", "Exponential", _HEUN, noise="brownian"),
    "DPM++ 3M SDE": Preset("dpmpp_3m_sde", "Exponential", _HEUN, points="n+1", noise="brownian"),
    "Restart": Preset("restart", "Karras", {"karras": True}),
    "HeunPP2": Preset("heunpp2", "Uniform"),  # Forge, like the next four
    "DEIS": Preset("deis_tab", "Uniform"),
    "IPNDM": Preset("ipndm", "Uniform", {"euler_to_zero": False}),
    "IPNDM_V": Preset("ipndm_v", "Uniform", {"weights": "zju", "euler_to_zero": False}),
    "DDPM": Preset("ddpm", "Uniform"),
}
# These take no schedule. The first four do not come from k-diffusion: they are variance-preserving, and end at their
# lowest timestep, with some noise left. Noise of the level before the run's first is added to a picture.
_VP: dict[str, Any] = {"start": "vp", "rescale_final": True, "noised_at": "before"}
_TIMESTEPS: tuple[str, dict[str, Any]] = ("ddim_uniform", {"last": "own"})
_DDIM = {**_VP, "spacing": _TIMESTEPS[0], "spacing_options": _TIMESTEPS[1], "counts": "a1111 timesteps"}
A1111_WITHOUT_SCHEDULE = {
    "DDIM": Sampler("DDIM", "ddim", **_DDIM),
    "DDIM CFG++": Sampler("DDIM CFG++", "euler_cfg_pp", **_DDIM, guidance_divisor=12.5),
    "PLMS": Sampler("PLMS", "pndm", **_DDIM),
    "UniPC": Sampler(
        "UniPC",
        "unipc",
        "normal",
        {"order": 3, "solver_type": "bh1"},
        {"points": "n+1", "last": "sigma_min", "interpolate": "log_alpha"},
        timestep="log_alpha",
        steps_from=_TIMESTEPS,
        counts="a1111 unipc",
        **_VP,
    ),
    "LCM": Sampler("LCM", "lcm", "normal", {}, {"original": 50}, timestep="lcm", counts="a1111"),
    "DPM fast": Sampler(
        "DPM fast", "dpm_fast", "exponential", {"eta": 1.0}, {"calls": 3, "last": "own"}, counts="a1111"
    ),
    "DPM adaptive": Sampler(
        "DPM adaptive", "dpm_adaptive", "exponential", {"eta": 1.0}, {"last": "own"}, counts="a1111"
    ),
}

COMFYUI_SCHEDULES: Schedules = {
    "simple": ("simple", {}),
    "sgm_uniform": ("sgm_uniform", {}),
    "karras": ("karras", {}),
    "exponential": ("exponential", {}),
    "ddim_uniform": ("ddim_uniform", {}),
    "beta": ("beta", {"index": True}),
    "normal": ("normal", {}),
    "linear_quadratic": ("linear_quadratic", {}),
    "kl_optimal": ("kl_optimal", {}),
}
COMFYUI_SAMPLERS = {
    "euler": Preset("euler", "normal"),
    "euler_cfg_pp": Preset("euler_cfg_pp", "normal"),
    "euler_ancestral": Preset("euler_a", "normal"),
    "euler_ancestral_cfg_pp": Preset("euler_a_cfg_pp", "normal"),
    "heun": Preset("heun", "normal"),
    "heunpp2": Preset("heunpp2", "normal"),
    "exp_heun_2_x0": Preset("seeds_2", "normal", {**_EXP_HEUN, "eta": 0.0}),
    "exp_heun_2_x0_sde": Preset("seeds_2", "normal", _EXP_HEUN),
    "dpm_2": Preset("dpm2", "normal", points="n+1"),
    "dpm_2_ancestral": Preset("dpm2_a", "normal", points="n+1"),
    "lms": Preset("lms", "normal", {"euler_to_zero": True}),
    "dpmpp_2s_ancestral": Preset("dpmpp_2s_a", "normal"),
    "dpmpp_2s_ancestral_cfg_pp": Preset("dpmpp_2s_a_cfg_pp", "normal", {"guided_midpoint": True}),
    "dpmpp_sde": Preset("dpmpp_sde", "normal", noise="brownian midpoints"),
    "dpmpp_2m": Preset("dpmpp_2m", "normal", _WHOLE_ORDER),
    "dpmpp_2m_cfg_pp": Preset("dpmpp_2m_cfg_pp", "normal"),
    "dpmpp_2m_sde": Preset("dpmpp_2m_sde", "normal", _WHOLE_ORDER, noise="brownian"),
    "dpmpp_2m_sde_heun": Preset("dpmpp_2m_sde", "normal", _HEUN, noise="brownian"),
    "dpmpp_3m_sde": Preset("dpmpp_3m_sde", "normal", _HEUN, noise="brownian"),
    "ddpm": Preset("ddpm", "normal"),
    "lcm": Preset("lcm", "normal"),
    "ipndm": Preset("ipndm", "normal"),
    "ipndm_v": Preset("ipndm_v", "normal", {"weights": "zju"}),
    "deis": Preset("deis_tab", "normal"),
    "res_multistep": Preset("res_multistep", "normal"),
    "res_multistep_cfg_pp": Preset("res_multistep_cfg_pp", "normal"),
    "res_multistep_ancestral": Preset("res_multistep", "normal", {"eta": 1.0}),
    "res_multistep_ancestral_cfg_pp": Preset("res_multistep_cfg_pp", "normal", {"eta": 1.0}),
    "gradient_estimation": Preset("gradient_estimation", "normal"),
    "gradient_estimation_cfg_pp": Preset("gradient_estimation_cfg_pp", "normal"),
    "er_sde": Preset("er_sde", "normal"),
    "seeds_2": Preset("seeds_2", "normal"),
    "seeds_3": Preset("seeds_3", "normal"),
    "ddim": Preset("ddim", "normal"),
    "uni_pc": Preset("unipc", "normal", {"order": 3, "solver_type": "bh1"}, "n+1", last=0.001),
    "uni_pc_bh2": Preset("unipc", "normal", {"order": 3, "solver_type": "bh2"}, "n+1", last=0.001),
}
# ComfyUI draws these Brownian paths on the GPU; ours depend only on the seed
COMFYUI_SAMPLERS |= {
    f"{name}_gpu": COMFYUI_SAMPLERS[name] for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
}
# These use only the ends of the schedule, which are the table's for the four below. Name: options of the spacing.
COMFYUI_ENDS: dict[str, dict[str, Any]] = {"dpm_fast": {"calls": 3}, "dpm_adaptive": {}}
_TO_THE_ENDS = ("normal", "karras", "exponential", "kl_optimal")


def _make_sampler(name: str, preset: Preset, schedule: tuple[str, dict[str, Any]], **more: Any) -> Sampler:
    """Return the sampler of a preset with a schedule."""
    spacing, options = schedule
    ends = {"points": preset.points, "last": preset.last, **options}
    return Sampler(name, preset.solver, spacing, preset.options, ends, noise=preset.noise, **more)


def _presets() -> dict[str, Sampler]:
    """Return the presets by every spelling.

    That is "Euler a", "Euler a Automatic" and "Euler a Karras" for A1111, "euler_ancestral" and "euler_ancestral
    karras" for ComfyUI.
    """
    presets = dict(A1111_WITHOUT_SCHEDULE)
    for name, preset in A1111_SAMPLERS.items():
        automatic = A1111_SCHEDULES[preset.schedule]
        for suffix, schedule in {"": automatic, " Automatic": automatic, **_by_suffix(A1111_SCHEDULES)}.items():
            presets[name + suffix] = _make_sampler(name + suffix, preset, schedule, counts="a1111")
    for name, preset in COMFYUI_SAMPLERS.items():
        for suffix, schedule in {"": COMFYUI_SCHEDULES[preset.schedule], **_by_suffix(COMFYUI_SCHEDULES)}.items():
            start = "sigma" if schedule[0] == "ddim_uniform" else "vp"
            presets[name + suffix] = _make_sampler(
                name + suffix, preset, schedule, start=start, timestep="nearest", counts="comfyui"
            )
    for name, options in COMFYUI_ENDS.items():
        for full in (f"{name} {schedule}" for schedule in _TO_THE_ENDS):
            ends = {**options, "last": "own"}
            presets[full] = Sampler(
                full, name, "exponential", {}, ends, start="vp", timestep="nearest", counts="comfyui"
            )
    return presets


def _by_suffix(schedules: Schedules) -> Schedules:
    """Return the schedules by the suffix that a sampler's name takes."""
    return {f" {name}": schedule for name, schedule in schedules.items()}


PRESETS = _presets()
