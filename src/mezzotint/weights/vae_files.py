"""Find a VAE that is given in place of a model's own: a file, a folder or a hub id.

A folder brings its config.json. A file has none, so what the UNet's latents are (their scaling factor, mean and
standard deviation) stays the model's; a TAESD, in a folder or a file, takes them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from mezzotint.errors import CheckpointError
from mezzotint.models.tiny_vae import TinyDecoder, TinyVAE
from mezzotint.weights import keys
from mezzotint.weights.files import TensorFile
from mezzotint.weights.folder import choose_weights, read_json, read_part
from mezzotint.weights.hub import network_files, resource
from mezzotint.weights.kinds import describe_kind
from mezzotint.weights.model_files import ModelFiles, NetworkFiles
from mezzotint.weights.single import read_network
from mezzotint.weights.tiny_vae_files import other_half, read_decoder, read_tiny

CLASS = "AutoencoderKL"
PREFIXES = (*keys.PREFIXES["vae"], "")


def replace_vae(plan: ModelFiles) -> None:
    """Add the VAE of the plan's options to a model that was described without one.

    Raises:
        CheckpointError: If it is missing, or is no VAE for this model.
    """
    source = plan.options.vae
    assert source is not None
    path = find_vae(str(source), plan.options.variant)
    if path.is_dir():
        part = read_part(path, "vae", read_json(path / "config.json").get("_class_name", CLASS), plan.options)
    else:
        part = _read_file(path, plan)
    channels, latents = getattr(plan.config("unet"), "out_channels", None), getattr(part.config, "latent_channels", 0)
    if channels not in (None, latents):
        raise CheckpointError(f"{path} is a VAE of {latents} latent channels; the UNet of {plan.path} needs {channels}")
    plan.parts.append(part)
    paths = sorted({file.path for file in part.files.values()})
    plan.given_files["vae"] = [*([path / "config.json"] if path.is_dir() else []), *paths]


def load_decoder(source: str, channels: int, dtype: torch.dtype, device: torch.device) -> TinyDecoder:
    """Load the decoder of a TAESD, for previews; its encoder may be missing.

    Args:
        source: A file, a folder or a hub id.
        channels: The latent channels that it must take.
        dtype: The dtype of its weights.
        device: Where it computes.

    Raises:
        CheckpointError: If it is missing or something else, or takes other latents.
    """
    path = find_vae(source)
    if path.is_dir():
        path /= choose_weights((file.name for file in path.iterdir()), None) or ""
    part = read_decoder(TensorFile(path))
    network = cast(TinyVAE, part.network()).decoder
    for problem in part.problems(network):
        raise CheckpointError(problem)
    if (found := network.conv_in.in_channels) != channels:
        raise CheckpointError(f"{path} is a TAESD of {found} latent channels; the model has {channels}")
    part.load(network, dtype, device)
    return network.requires_grad_(False)


def _read_file(path: Path, plan: ModelFiles) -> NetworkFiles:
    """Describe the VAE in a file: alone, or in a whole checkpoint; in the original layout, or diffusers'."""
    file = TensorFile(path)
    if tiny := read_tiny(file, dict(plan.options.config_of("vae"))):
        if ("xl" in path.stem.lower()) != (plan.family == "sdxl") and path.stem.lower().startswith("tae"):
            plan.notices.append(
                f"{path.name} is named as a TAESD of {'SD 1 and 2' if plan.family == 'sdxl' else 'SDXL'}, and the "
                f"model is {plan.family}; if colours are wrong, give the other one"
            )
        return tiny
    first = ("encoder.conv_in.weight", keys.DIFFUSERS_VAE)
    prefix = next((known for known in PREFIXES if any(f"{known}{key}" in file.entries for key in first)), None)
    if prefix is None:
        raise CheckpointError(f"{path} holds {describe_kind(file.shapes)}, not a VAE")
    fields, sources, unknown = read_network(path, "vae", "vae", prefix, file.shapes, plan.family)
    fields |= plan.latents
    config = path.with_name("config.json")
    if prefix + keys.DIFFUSERS_VAE in file.entries and config.exists():  # it may be that of the file's own folder
        described = read_json(config)
        fields = described if described.get("_class_name") == CLASS else fields
    fields = {**fields, **plan.options.config_of("vae")}
    return NetworkFiles.of("vae", path, fields, dict.fromkeys(file.entries, file), sources, unknown)


def find_vae(source: str, variant: str | None = None) -> Path:
    """Return a VAE's file, or its folder: the path itself, its folder vae, its one file, or a TAESD's decoder.

    Raises:
        CheckpointError: If it is missing.
    """
    path = Path(resource(source, "VAE", lambda names: _choose(source, names, variant)))
    if not path.is_dir():
        return path
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file() and choose_weights((file.name for file in folder.iterdir()), None):
            return folder
    halves = sorted(file for file in path.iterdir() if "decoder" in file.name and other_half(file))
    return halves[0] if len(halves) == 1 else path / _one_file(str(path), [file.name for file in path.iterdir()])


def _choose(name: str, listing: Iterable[str], variant: str | None) -> list[str]:
    """Choose the files of a VAE in a hub repository."""
    names = set(listing)
    for folder in ("", "vae/"):
        files = network_files(names, folder, variant)
        if f"{folder}config.json" in names and files:
            return files
    return [_one_file(name, names)]


def _one_file(name: str, names: Iterable[str]) -> str:
    """Return the only .safetensors file among the names. Raises CheckpointError if it is not one."""
    found = sorted(each for each in names if each.endswith(".safetensors") and "/" not in each)
    if len(found) != 1:
        raise CheckpointError(
            f"{name} has no VAE: expected config.json and weights in it or in its folder vae, or one .safetensors file"
        )
    return found[0]
