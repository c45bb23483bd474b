"""What the two stages minimise: finite, reaching every parameter, with the target of the papers, and falling."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig, ScheduleConfig, UNetConfig, VAEConfig
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import Condition, UNet
from mezzotint.models.vae import VAE, Posterior
from mezzotint.train.scratch.diffusion import TextToLatents, diffusion_losses
from mezzotint.train.scratch.stage import Losses
from mezzotint.train.scratch.text import TextToMean, text_losses
from mezzotint.train.scratch.vae import KL_WEIGHT, image_gradients, vae_losses

SCHEDULE = Schedule.from_config(ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
ZERO_SNR = Schedule.from_config(
    ScheduleConfig(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
)
UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=8,
)
CLIP = CLIPConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
    bos_token_id=18,
    eos_token_id=19,
    pad_token_id=19,
)
IDS = torch.tensor([[18, k, 2 * k, 19, 19, 19] for k in range(8)])
LATENTS = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(3))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


@pytest.fixture
def model() -> TextToLatents:
    return seeded(lambda: TextToLatents(CLIPTextModel(CLIP), UNet(UNET)))  # type: ignore[return-value]


@pytest.fixture
def vae() -> VAE:
    return seeded(lambda: VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4)))  # type: ignore[return-value]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_all_learn(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} has a gradient of zero throughout"


# ---- the diffusion stage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["plain", "zero SNR"])
def test_the_diffusion_loss_reaches_every_parameter(model: TextToLatents, schedule: Schedule, prediction: str) -> None:
    losses = diffusion_losses(model, LATENTS, IDS, schedule, PREDICTIONS[prediction], generator())
    assert losses.keys() == {"loss"} and losses["loss"].isfinite() and losses["loss"].shape == ()
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    assert_all_learn(model)
    unused = set(range(20)) - set(IDS.flatten().tolist())
    rows = model.text_encoder.text_model.embeddings.token_embedding.weight.grad
    assert rows is not None and {k for k in range(20) if not rows[k].any()} == unused


class Oracle(nn.Module):
    """Stands for the UNet, and answers right: it is told the clean latents, and has all else from its input."""

    def __init__(self, schedule: Schedule, kind: str, latents: Tensor) -> None:
        super().__init__()
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
        self.kind, self.latents = kind, latents.double()
        self.timesteps: list[Tensor] = []

    def forward(self, sample: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.timesteps.append(timesteps)
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # of the variance-preserving process
        noise = (sample.double() - alpha * self.latents) / sigma
        answer = {"epsilon": noise, "v_prediction": alpha * noise - sigma * self.latents, "sample": self.latents}
        return answer[self.kind].float()


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["plain", "zero SNR"])
def test_the_target_is_the_analytic_one(model: TextToLatents, schedule: Schedule, kind: str) -> None:
    model.unet = Oracle(schedule, kind, LATENTS)  # type: ignore[assignment]
    for seed in range(4):
        loss = diffusion_losses(model, LATENTS, IDS, schedule, PREDICTIONS[kind], generator(seed))["loss"]
        assert loss < 1e-9, "an oracle has nothing to learn"


def test_timesteps_are_one_of_each_stratum(model: TextToLatents) -> None:
    oracle = Oracle(SCHEDULE, "epsilon", LATENTS)
    model.unet = oracle  # type: ignore[assignment]
    for seed in range(50):
        diffusion_losses(model, LATENTS, IDS, SCHEDULE, PREDICTIONS["epsilon"], generator(seed))
    timesteps = torch.stack(oracle.timesteps)  # (50, 8)
    assert torch.equal(timesteps // 125, torch.arange(8).expand(50, 8))
    assert 0 <= timesteps.min() < 20 and 980 < timesteps.max() <= 999


def test_the_same_generator_gives_the_same_loss(model: TextToLatents) -> None:
    def loss(seed: int) -> Tensor:
        return diffusion_losses(model, LATENTS, IDS, SCHEDULE, PREDICTIONS["v_prediction"], generator(seed))["loss"]

    torch.manual_seed(1)
    first = loss(5)
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(loss(5), first) and not torch.equal(loss(6), first)


def test_shuffled_captions_are_logged_and_not_learnt(model: TextToLatents) -> None:
    arguments = (model, LATENTS, IDS, SCHEDULE, PREDICTIONS["v_prediction"])
    plain = diffusion_losses(*arguments, generator())
    both = diffusion_losses(*arguments, generator(), with_shuffled=True)
    assert both.keys() == {"loss", "shuffled", "right"}
    assert torch.equal(both["loss"], plain["loss"]) and torch.equal(both["right"], plain["loss"])
    assert not both["shuffled"].requires_grad and not both["right"].requires_grad
    assert torch.equal(
        both["shuffled"], diffusion_losses(model, LATENTS, IDS.roll(1, 0), *arguments[3:], generator())["loss"]
    )


def test_words_are_learnt(model: TextToLatents) -> None:
    """Each caption means one flat colour of latents: soon the right captions explain them and shuffled ones do not."""
    colours = torch.linspace(-1.5, 1.5, 8).view(8, 1, 1, 1) * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    latents = colours.expand(8, 4, 4, 4).contiguous()
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, fused=True)
    losses: list[Losses] = []
    for step in range(40):
        arguments = (model, latents, IDS, ZERO_SNR, PREDICTIONS["v_prediction"], generator(step))
        losses.append(diffusion_losses(*arguments, with_shuffled=step == 39))
        losses[-1]["loss"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[-1]["shuffled"] > 1.4 * losses[-1]["right"]


# ---- the VAE's stage -------------------------------------------------------------------------------------------------


def test_the_text_encoder_foretells_the_mean_of_each_caption(model: TextToLatents) -> None:
    """Two captions, two pictures each: the loss falls to the pictures' variance about their caption's mean."""
    torch.manual_seed(0)
    foretelling = TextToMean(model.text_encoder, 4 * 2 * 2)
    latents = torch.randn(4, 4, 2, 2)
    ids = torch.tensor([[1, 5, 2, 2], [1, 5, 2, 2], [1, 7, 2, 2], [1, 7, 2, 2]])
    floor = (latents.view(2, 2, -1) - latents.view(2, 2, -1).mean(1, keepdim=True)).square().mean()
    optimiser = torch.optim.Adam(foretelling.parameters(), 1e-2)
    for _ in range(200):
        losses = text_losses(foretelling, latents, ids)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
    assert losses["loss"].item() == pytest.approx(floor.item(), abs=1e-3)
    assert losses["last"].item() == pytest.approx(floor.item(), abs=1e-3)


def pixels(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 8, 12, generator=generator(9)) * 2 - 1


def test_the_vae_loss_reaches_every_parameter(vae: VAE) -> None:
    losses = vae_losses(vae, pixels(), generator())
    assert losses.keys() == {"loss", "l1", "kl", "psnr"}
    assert all(value.isfinite() and value.shape == () for value in losses.values())
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    assert_all_learn(vae)


class Still(nn.Module):
    """A VAE with a given posterior and a given picture."""

    def __init__(self, mean: float, std: float, drawn: Tensor) -> None:
        super().__init__()
        self.moments, self.drawn = (mean, 2 * math.log(std)), drawn

    def encode(self, pixels: Tensor) -> Posterior:
        mean, logvar = (torch.full((len(pixels), 4, 1, 1), moment) for moment in self.moments)
        return Posterior(mean, logvar)

    def decode(self, z: Tensor) -> Tensor:
        return self.drawn


def test_the_vae_loss_by_hand() -> None:
    picture = pixels()
    mean, std = 0.7, 1.3
    losses = vae_losses(Still(mean, std, picture + 0.25), picture, generator())  # type: ignore[arg-type]
    kl = 0.5 * (mean**2 + std**2 - 1 - math.log(std**2))  # to the unit Gaussian, a dimension
    assert losses["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert losses["l1"].item() == pytest.approx(0.25, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(0.25 + KL_WEIGHT * kl, rel=1e-4), "a shift has no edges"


def test_the_kl_of_a_unit_gaussian_is_none_and_a_perfect_picture_has_no_loss() -> None:
    picture = pixels()
    losses = vae_losses(Still(0.0, 1.0, picture), picture, generator())  # type: ignore[arg-type]
    assert losses["kl"] == 0 and losses["l1"] == 0 and losses["loss"] == 0


def test_psnr_by_hand() -> None:
    picture = torch.zeros(2, 3, 8, 8)
    losses = vae_losses(Still(0.0, 1.0, picture + 0.2), picture, generator())  # type: ignore[arg-type]
    assert losses["psnr"].item() == pytest.approx(20 * math.log10(2 / 0.2), rel=1e-4), "of a range of 2"


def test_gradients_are_differences_of_neighbours() -> None:
    ramp = torch.arange(4.0).view(1, 1, 4, 1) * 2 + torch.arange(5.0).view(1, 1, 1, 5) * 3
    down, right = image_gradients(ramp)
    assert down.shape == (1, 1, 3, 5) and (down == 2).all()
    assert right.shape == (1, 1, 4, 4) and (right == 3).all()


def test_the_vae_learns(vae: VAE) -> None:
    x = torch.linspace(-1, 1, 8)
    picture = torch.stack([torch.stack([x * s, -x * s, x.flip(0)]).unsqueeze(1).expand(3, 8, 8) for s in (1, -1)])
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3, fused=True)
    history = []
    for step in range(40):
        losses = vae_losses(vae, picture, generator(step))
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        history.append((losses["loss"].item(), losses["psnr"].item()))
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] > history[0][1] + 3
