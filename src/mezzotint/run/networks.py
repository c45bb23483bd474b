"""The networks that a user gives a pipeline in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from mezzotint.errors import CheckpointError, RequestError
from mezzotint.models.unet import UNet
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.model_files import NETWORKS, config_class, join_names, make_network


def unwrap(network: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile` returns, or the module itself."""
    inner = getattr(network, "_orig_mod", network)
    return inner if isinstance(inner, nn.Module) else network


def adopt(name: str, given: object) -> Any:
    """Return the network to use for one that was given: itself, or a copy in a class of ours of one of diffusers.

    Args:
        name: "unet", "vae", "text_encoder" or "text_encoder_2".
        given: A network of this package, also compiled, or of diffusers or transformers.

    Raises:
        RequestError: If it is anything else, or one that our classes cannot express.
    """
    theirs, _, ours = NETWORKS[name]
    if isinstance(given, nn.Module) and isinstance(unwrap(given), ours):  # type: ignore[arg-type]  # a class
        return given
    library = type(given).__module__.partition(".")[0]
    if isinstance(given, nn.Module) and library in ("diffusers", "transformers") and type(given).__name__ in theirs:
        return _copy_foreign(name, given)
    raise RequestError(
        f"{name} is a {type(given).__module__}.{type(given).__name__}; it must be the {ours.__name__} of "
        f"{ours.__module__}, or the {' or '.join(theirs)} of diffusers or transformers"
    )


def _copy_foreign(name: str, given: nn.Module) -> Any:
    """Return a network of ours with the config and a copy of the weights of one of diffusers or transformers."""
    config: Any = given.config
    fields: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    kind = f"the {type(given).__name__} that was given as {name}"
    try:
        with torch.device("meta"):
            ours = config_class(name, type(given).__name__)
            network: Any = make_network(name, ours.model_validate({**fields, "architectures": (type(given).__name__,)}))
    except (ValidationError, CheckpointError) as error:
        raise RequestError(f"{kind} cannot be used: {error}") from None
    wanted = network.state_dict().keys()
    state = {key: tensor.detach().clone() for key, tensor in given.state_dict().items()}
    if name.startswith("text_encoder"):  # transformers 5 drops the prefix
        state = {key if key in wanted else f"text_model.{key}": tensor for key, tensor in state.items()}
        state = {key: tensor for key, tensor in state.items() if not key.endswith("embeddings.position_ids")}
    if wrong := sorted(wanted ^ state.keys()):
        raise RequestError(f"{kind} cannot be used: only one of the two classes has {join_names(wrong)}")
    network.load_state_dict(state, assign=True)
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def check_together(parts: Parts) -> None:
    """Check that networks which come from different models fit together.

    Raises:
        RequestError: If they do not.
    """
    unet, vae = parts.unet.config, parts.vae.config
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    if unet.cross_attention_dim != width:
        raise RequestError(
            f"the UNet has cross_attention_dim {unet.cross_attention_dim}, but the text encoders are {width} wide"
        )
    if unet.out_channels != vae.latent_channels:
        raise RequestError(
            f"the UNet has {unet.out_channels} out_channels, but the VAE {vae.latent_channels} latent_channels"
        )
    if (unet.addition_embed_type == "text_time") != (parts.family == "sdxl"):
        raise RequestError(f"the UNet has addition_embed_type {unet.addition_embed_type}; this model is {parts.family}")
    if len(parts.text_encoders) != len(parts.tokenizers):
        raise RequestError(
            f"{len(parts.text_encoders)} text encoders were given for {len(parts.tokenizers)} tokenizers"
        )


def fuse_projections(unet: nn.Module) -> None:
    """Fuse the attention projections of a UNet, also of a compiled one."""
    inner = unwrap(unet)
    assert isinstance(inner, UNet)
    inner.fuse_projections()
