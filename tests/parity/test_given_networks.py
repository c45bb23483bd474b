"""Networks of diffusers and transformers, given to a pipeline of ours, draw bit for bit what their files draw."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, ControlNetModel

from mezzotint import Request, RequestError
from pictures import FAMILIES, Pair, fields


@pytest.mark.parametrize("family", FAMILIES)
def test_their_networks_in_place_of_ours(pairs: dict[str, Pair], family: str) -> None:
    pair, request = pairs[family], Request(**fields(sampler="euler", steps=2, width=64, height=64))
    expected = pair.ours.generate(request)
    pipe = copy.deepcopy(pair.ours)
    theirs = [pair.theirs.text_encoder, *([pair.theirs.text_encoder_2] if family == "sdxl" else [])]
    with torch.no_grad():
        for network in (pipe.unet, pipe.vae, *pipe.text_encoders):
            for parameter in network.parameters():
                parameter.mul_(0.5)
    pipe.unet, pipe.vae, pipe.text_encoders = pair.theirs.unet, pair.theirs.vae, theirs
    found = pipe.generate(request)
    assert torch.equal(found.latents, expected.latents)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in expected.images]
    assert pipe.edited == ["unet", "vae", "text_encoder", "text_encoder_2"][: 2 + len(theirs)]
    with torch.no_grad():  # a copy: theirs may be edited
        weight = pair.theirs.unet.conv_in.weight
        weight.add_(1.0)
        assert torch.equal(pipe.generate(request).latents, expected.latents)
        weight.sub_(1.0)


def test_what_our_classes_cannot_express_is_a_sentence(pairs: dict[str, Pair]) -> None:
    pair = pairs["sd1"]
    with pytest.raises(RequestError, match=r"vae is a diffusers\..*AsymmetricAutoencoderKL; .* the AutoencoderKL or"):
        pair.ours.vae = AsymmetricAutoencoderKL(norm_num_groups=8)
    with pytest.raises(RequestError, match=r"unet is a diffusers\..*ControlNetModel; it must be"):
        pair.ours.unet = ControlNetModel(block_out_channels=(32,), down_block_types=("DownBlock2D",))
    other = copy.deepcopy(pair.theirs.unet)
    other.register_to_config(act_fn="mish")
    with pytest.raises(RequestError, match="that was given as unet cannot be used: The UNet's act_fn"):
        pair.ours.unet = other
    assert not pair.ours.edited
