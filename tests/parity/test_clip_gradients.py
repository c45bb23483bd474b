"""Gradients against transformers and diffusers: of the text encoder, and of the whole step that training takes.

A loss that falls proves nothing: a step that is compiled or fused wrongly also learns something. So each gradient of
ours is held against an eager reference with the same weights and inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from mezzotint.config import CLIPConfig, ScheduleConfig, UNetConfig
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import UNet
from mezzotint.train.scratch.diffusion import TextToLatents, diffusion_losses

BOS, EOS = tiny.TOKENS - 2, tiny.TOKENS - 1
IDS = torch.tensor([[BOS, *range(3 * k, 3 * k + k + 1), *[EOS] * (11 - k)] for k in range(4)])  # (4, 13)


def clip_like(theirs: Any) -> CLIPTextModel:
    """Ours, with a copy of their weights."""
    encoder = CLIPTextModel(
        CLIPConfig.model_validate({**theirs.config.to_dict(), "architectures": [type(theirs).__name__]})
    )
    encoder.load_state_dict({tiny.with_prefix(key): value for key, value in theirs.state_dict().items()})
    return encoder


def assert_same_gradients(ours: nn.Module, theirs: dict[str, nn.Parameter]) -> None:
    """Each within 1e-3 of its own largest value, or, where that is rounding (a key's bias has none), of nothing."""
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == theirs.keys()
    for name, parameter in parameters.items():
        expected = theirs[name].grad
        if parameter.grad is None or expected is None:
            assert parameter.grad is None and expected is None, name
            continue
        assert parameter.grad.isfinite().all(), name
        scale = max(float(expected.abs().max()), 1e-5 * largest)
        assert float((parameter.grad - expected).abs().max()) < 1e-3 * scale, name


@pytest.mark.parametrize("projection", [False, True], ids=["hidden", "pooled"])
@pytest.mark.parametrize("skip", [0, 1])
def test_the_gradient_of_every_parameter_is_transformers(projection: bool, skip: int) -> None:
    theirs = tiny.clip(projection=projection).train()
    ours = clip_like(theirs).train()
    generator = torch.Generator().manual_seed(0)
    aim, pooled_aim = torch.randn(4, 13, tiny.WIDTH, generator=generator), torch.randn(4, 32, generator=generator)

    hidden, pooled = ours(IDS, skip=skip, final_norm=not skip)
    loss = (hidden - aim).square().mean()
    if projection:
        loss = loss + (pooled - pooled_aim).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]

    out = theirs(IDS, output_hidden_states=True)
    their_hidden = out.hidden_states[-2] if skip else out.last_hidden_state
    their_loss = (their_hidden - aim).square().mean()
    if projection:
        their_loss = their_loss + (out.text_embeds - pooled_aim).square().mean()
    their_loss.backward()

    torch.testing.assert_close(loss, their_loss)
    assert_same_gradients(ours, {tiny.with_prefix(name): p for name, p in theirs.named_parameters()})


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_whole_training_step_is_theirs(kind: str) -> None:
    """Captions to loss through both networks, on latents in channels_last as the trainer has them."""
    their_clip, their_unet = tiny.clip().train(), tiny.unet("sd1").train()
    unet = UNet(UNetConfig.model_validate(dict(their_unet.config)))
    unet.load_state_dict(their_unet.state_dict())
    model = TextToLatents(clip_like(their_clip), unet).train()
    schedule = Schedule.from_config(ScheduleConfig.model_validate(tiny.SCHEDULER_CONFIGS["sd1"]))
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    shown: list[tuple[Tensor, Tensor]] = []
    unet.register_forward_pre_hook(lambda _, inputs: shown.append((inputs[0].detach(), inputs[1])))

    loss = diffusion_losses(model, latents, IDS, schedule, PREDICTIONS[kind], torch.Generator().manual_seed(2))["loss"]
    loss.backward()  # type: ignore[no-untyped-call]

    ((sample, timesteps),) = shown
    alpha_bar = torch.from_numpy(schedule.alphas_cumprod)[timesteps].float().view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noise = (sample - alpha * latents) / sigma
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}[kind]
    context = their_clip(IDS).last_hidden_state
    output = their_unet(sample.contiguous(), timesteps, context, return_dict=False)[0]
    their_loss = (output - target).square().mean()
    their_loss.backward()

    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    assert_same_gradients(model.unet, dict(their_unet.named_parameters()))
    assert_same_gradients(model.text_encoder, {tiny.with_prefix(name): p for name, p in their_clip.named_parameters()})
