"""A step of `mezzotint train controlnet` against diffusers' train_controlnet, with the same noise and timesteps."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

import tiny
from mezzotint.config import UNetConfig
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.unet import Condition, UNet
from mezzotint.train.recipe import Recipe
from mezzotint.train.trainable import TrainableModel
from mezzotint.weights.checkpoint import Parts

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WIDTHS = (8, 8, 16, 16)


class Texts:
    """Captions that are encoded already."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition

    def __call__(self, captions: Any, keep: bool = True) -> Condition:
        return Condition(self.condition.context, self.condition.pooled)


def models(family: str) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(3)
    theirs = UNet2DConditionModel(**tiny.UNETS[family])
    ours = UNet(UNetConfig.model_validate(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs.requires_grad_(False)


def trainable(unet: UNet, prediction: str, texts: Texts) -> TrainableModel:
    recipe = Recipe.of("controlnet", None, {"data": "x", "condition_widths": WIDTHS})
    scheduler = {"_class_name": "DDIMScheduler", **SCHEDULE, "prediction_type": prediction}
    parts = Parts("sd1", unet, cast(Any, None), [], [], scheduler, {}, {}, cast(Any, None), cast(Any, ()))
    model = TrainableModel(parts, recipe)
    model.texts = cast(Any, texts)
    return model


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_new_controlnet_is_diffusers_from_unet(family: str) -> None:
    unet, theirs = models(family)
    made = ControlNet.from_unet(unet, WIDTHS)
    expected = ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=WIDTHS)
    state = expected.state_dict()
    assert made.state_dict().keys() == state.keys()
    for name, tensor in made.state_dict().items():
        drawn = name.startswith("controlnet_cond_embedding") and "conv_out" not in name
        assert tensor.shape == state[name].shape and (drawn or torch.equal(tensor, state[name])), name


@pytest.mark.parametrize(
    ("family", "prediction"),
    [("sd1", "epsilon"), ("sd1", "v_prediction"), ("sd2", "v_prediction"), ("sdxl", "epsilon")],
)
def test_gradients_are_those_of_diffusers_recipe(family: str, prediction: str) -> None:
    """The largest difference of each gradient from diffusers', relative to its largest value."""
    unet, theirs = models(family)
    draw = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 4, 8, 8, generator=draw)
    hints, width = torch.rand(2, 3, 64, 64, generator=draw), tiny.UNETS[family]["cross_attention_dim"]
    condition = Condition(torch.randn(2, 7, width, generator=draw), torch.randn(2, tiny.WIDTH, generator=draw))
    time_ids, timesteps = torch.full((2, 6), 64.0), torch.tensor([481, 7])
    model = trainable(unet, prediction, Texts(condition))
    own = model.controlnet
    assert own is not None and set(model.trainable_parameters()) == {
        f"controlnet.{n}" for n, _ in own.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in own.named_parameters():  # zero convolutions would leave all other gradients zero
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                parameter.normal_(std=0.2, generator=draw)
    network = ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=WIDTHS)
    network.load_state_dict(own.state_dict(), strict=True)

    loss = model.losses(latents, ["", ""], time_ids, timesteps, noise, hints).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    added = {"text_embeds": condition.pooled, "time_ids": time_ids} if family == "sdxl" else None
    down, mid = network(
        noisy, timesteps, encoder_hidden_states=condition.context, controlnet_cond=hints, added_cond_kwargs=added,
        return_dict=False,
    )  # fmt: skip
    output = theirs(
        noisy, timesteps, encoder_hidden_states=condition.context, added_cond_kwargs=added,
        down_block_additional_residuals=down, mid_block_additional_residual=mid,
    ).sample  # fmt: skip
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    F.mse_loss(output, target).backward()
    expected = {name: cast(Tensor, parameter.grad) for name, parameter in network.named_parameters()}
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None
        largest = expected[name].abs().max()
        assert largest > 0 and (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name
