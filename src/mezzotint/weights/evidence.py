"""Detect the noise schedule and prediction type of a single file.

The evidence is taken in this order: metadata (ModelSpec), marker tensors (`v_pred`, `ztsnr`, `edm_mean` and `edm_std`,
`edm_vpred.sigma_max`), a .yaml file of the same name beside it, the shapes and statistics of its weights. Only the last
is a guess.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import CheckpointError
from mezzotint.files import read_bytes
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Family

# a spelling without spaces, hyphens, underscores and a final "pred" or "prediction"
SPELLINGS = {"v": "v_prediction", "velocity": "v_prediction", "x0": "sample", "sample": "sample"} | {
    name: "epsilon" for name in ("epsilon", "eps", "noise")
}
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
ARCHITECTURES = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
PREDICTION_MARKERS = {"edm_vpred.sigma_max": "v_prediction", "edm_mean": "epsilon", "v_pred": "v_prediction"}
MARKERS = (*PREDICTION_MARKERS, "edm_vpred.sigma_min", "edm_std", "ztsnr")
SD2_BASE_STEPS = 875000  # the global_step of the published SD 2-base
# the key of whose statistics ComfyUI tells SD 2.x's predictions apart, and the standard deviation above which it is v
SD2_BIAS, SD2_V_STD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09

MAX_YAML_BYTES = 1_000_000  # the published ones have 2 to 4 kB
# Latent Diffusion names the parametrization, Stability's generative-models the class of its scaling
YAML_PREDICTION = re.compile(
    r"""^[ \t]*(?:parameterization[ \t]*:[ \t]*["']?([^\s"'#][^\r\n"'#]{0,59}?)["']?"""
    r"""|target[ \t]*:[ \t]*["']?[\w.]*\.denoiser_scaling\.(\w{1,60})["']?)[ \t\r]*(?:\#.*)?$""",
    re.MULTILINE,
)
SCALINGS = {"VScaling": "v_prediction", "EpsScaling": "epsilon"}

MAX_CHANNELS = 64  # of the latents
PLAYGROUND_SCALING_FACTOR = 0.5  # of the VAE of a file with edm_mean and edm_std


@dataclass
class Evidence:
    """The noise schedule and prediction type of a file, and what they were read from.

    Attributes:
        prediction: The prediction type.
        source: What it was read from, such as a metadata key.
        schedule: Fields of the scheduler_config.json that differ from the family's published one.
        latents: Fields of the VAE's config: the mean and standard deviation of the latents, and their scaling factor.
        notices: A sentence if the prediction is a guess, or if the file says something that is not understood.
        files: Other files that were read.
    """

    prediction: str = "epsilon"
    source: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def find_evidence(file: TensorFile, prefix: str, family: Family, prediction: str | None) -> Evidence:
    """Detect the noise schedule and prediction type of a file.

    Args:
        file: The file.
        prefix: The prefix of the UNet's tensors.
        family: The family.
        prediction: The prediction type, if the caller sets it; it is then not detected.

    Raises:
        CheckpointError: If a marker tensor has no valid value, or the .yaml file cannot be read.
    """
    found = Evidence()
    _read_markers(file, found)
    given = (prediction, "as given") if prediction else None
    unread: list[str] = []
    detected = (
        given
        or _from_metadata(file, unread)
        or _from_markers(file)
        or _from_yaml(file.path.with_suffix(".yaml"), unread)
    )
    if detected:
        found.prediction, found.source = detected
    elif family == "sd2" and file.scalars.get("global_step") != SD2_BASE_STEPS:
        _guess_sd2(file, prefix, found)
    else:
        found.source = "as usual in this family"
    if found.source.endswith(".yaml"):
        found.files.append(file.path.with_suffix(".yaml"))
    found.notices += [
        f"{file.path.name}: {said}, which is not understood; the prediction is {found.prediction}, {found.source}: "
        "give prediction (--prediction) if it is another"
        for said in unread
    ]
    return found


def _read_markers(file: TensorFile, found: Evidence) -> None:
    """Read the marker tensors of the noise schedule."""
    if "edm_vpred.sigma_max" in file.entries:
        low = _numbers(file, "edm_vpred.sigma_min")[0] if "edm_vpred.sigma_min" in file.entries else 0.002
        high = _numbers(file, "edm_vpred.sigma_max")[0]
        if not 0.0 < low < high:
            raise CheckpointError(f"{file.path}: edm_vpred.sigma_min must be above 0 and below edm_vpred.sigma_max")
        found.schedule = edm_schedule("EDMEulerScheduler", 1.0, low, high)
        found.schedule["sigma_schedule"] = "exponential"  # as CosXL was trained
    elif {"edm_mean", "edm_std"} <= file.entries.keys():
        mean, std = _numbers(file, "edm_mean"), _numbers(file, "edm_std")
        if min(std) <= 0.0 or len(mean) != len(std):
            raise CheckpointError(f"{file.path}: edm_std must have a positive number for each of edm_mean")
        found.schedule = edm_schedule("EDMDPMSolverMultistepScheduler", 0.5, 0.002, 80.0)
        found.latents = {"latents_mean": mean, "latents_std": std, "scaling_factor": PLAYGROUND_SCALING_FACTOR}
    if "ztsnr" in file.entries:
        found.schedule["rescale_betas_zero_snr"] = True


def edm_schedule(class_name: str, sigma_data: float, sigma_min: float, sigma_max: float) -> dict[str, Any]:
    """Return the scheduler_config.json of a model with EDM's preconditioning, without its prediction type."""
    return {
        "_class_name": class_name,
        "num_train_timesteps": 1000,
        "rho": 7.0,
        "sigma_data": sigma_data,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
    }


def _spelled(text: str) -> str | None:
    """Return the prediction type of a spelling such as "v", "vpred" or "V-Prediction", or None."""
    plain = re.sub(r"[\s_-]+", "", text[:100].lower())
    return SPELLINGS.get(re.sub(r"(?<=.)pred(iction)?$", "", plain))


def _from_metadata(file: TensorFile, unread: list[str]) -> tuple[str, str] | None:
    """Return the prediction type in ModelSpec metadata and its key, or None; add what is not understood to `unread`."""
    for key in PREDICTION_KEYS:
        value = file.metadata.get(key, "").strip()
        if prediction := _spelled(value):
            return prediction, key
        if value:
            unread.append(f"its {key} is {value[:60]!r}")
    architecture = file.metadata.get("modelspec.architecture", "")
    for beginning, prediction in ARCHITECTURES.items():
        if architecture.startswith(beginning):
            return prediction, "modelspec.architecture"
    return None


def _from_markers(file: TensorFile) -> tuple[str, str] | None:
    """Return the prediction type of the first marker tensor and its name, or None."""
    return next(((prediction, name) for name, prediction in PREDICTION_MARKERS.items() if name in file.entries), None)


def _from_yaml(path: Path, unread: list[str]) -> tuple[str, str] | None:
    """Return the prediction type in the .yaml file that belongs to a checkpoint and its name, or None.

    What is not understood is added to `unread`.
    """
    if not path.exists():
        return None
    try:
        text = read_bytes(path, MAX_YAML_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    encoding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if match := YAML_PREDICTION.search(text.decode(encoding, "replace")):
        if prediction := _spelled(match[1]) if match[1] else SCALINGS.get(match[2]):
            return prediction, path.name
        unread.append(f"{path.name} has {match[0].strip()[:120]!r}")
    return None


def _guess_sd2(file: TensorFile, prefix: str, found: Evidence) -> None:
    """Guess the prediction of an SD 2.x file as ComfyUI does, from the spread of one bias."""
    entry = file.entries.get(prefix + SD2_BIAS)
    channels = (*file.shapes.get(f"{prefix}input_blocks.0.0.weight", ()), 0, 0)[1]
    why = "its weights do not have the statistics of v-prediction"
    if channels == 4 and entry is not None and entry.dtype.is_floating_point and entry.count <= 2**16:
        std = float(torch.std(file.read(prefix + SD2_BIAS).float(), unbiased=False))
        if std > SD2_V_STD:
            found.prediction = "v_prediction"
            why = f"the standard deviation of a bias is {std:.2g}, as in models of v-prediction"
    found.source = "a guess"
    found.notices.append(
        f"{file.path.name} does not say what its UNet predicts; {found.prediction} is assumed, since {why}: give "
        "prediction (--prediction) if it is another"
    )


def _numbers(file: TensorFile, key: str) -> tuple[float, ...]:
    """Return the values of a marker tensor. Raises CheckpointError if they are not a few finite numbers."""
    entry = file.entries[key]
    if 1 <= entry.count <= MAX_CHANNELS:
        values = tuple(float(value) for value in file.read(key).flatten().double())
        if all(map(math.isfinite, values)):
            return values
    raise CheckpointError(f"{file.path}: {key} must be at most {MAX_CHANNELS} finite numbers")
