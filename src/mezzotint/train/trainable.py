"""The model in a fine-tuning run: which parameters are trained, and the loss.

    x = x0 + sigma * noise        at a timestep of the model's schedule, drawn uniformly
    loss = w(sigma) * mean((network(x, timestep, caption) - target)^2)

The target follows diffusion/prediction.py (epsilon or v). w is 1, or Min-SNR's (Hang et al. 2023, eq. 8; for v divided
by SNR + 1). Noise, noise offset (Guttenberg 2023: one constant per channel, so that the model can learn a picture's
mean) and timesteps are functions of (seed, epoch, picture) only.

A ControlNet (Zhang et al. 2023) is trained beside the frozen network, whose features it adds to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mezzotint import prompt, samplers
from mezzotint.conditioning.encode import Conditioner, extend
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.errors import RequestError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.offload import count_parameters
from mezzotint.models.unet import Condition, UNet
from mezzotint.placement import Placement
from mezzotint.train.keyed_rng import generator
from mezzotint.train.latents import Texts
from mezzotint.train.recipe import Recipe
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.control_files import ControlFiles, scan_control

ADAPTER = "default"  # peft's name of a network's only adapter
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ENCODERS = ("text_encoder", "text_encoder_2")


class Batch(Protocol):
    """Pictures of one size. latents: (B, C, h, w), float32, scaled; time_ids: (B, 6), SDXL's micro-conditioning.

    hints: conditioning pictures (B, 3, H, W) in [0, 1], of a ControlNet.
    """

    @property
    def epoch(self) -> int: ...
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def latents(self) -> Tensor: ...
    @property
    def time_ids(self) -> Tensor: ...
    @property
    def hints(self) -> Tensor | None: ...


class TrainableModel(nn.Module):
    """The networks of a model with the parameters that a recipe trains.

    Submodules: `unet`, `text_encoder` (for SDXL also `text_encoder_2`), for textual inversion `vectors`, one parameter
    (n, width) for each text encoder, and for a ControlNet `controlnet`. A LoRA and a new ControlNet start as no change.
    """

    def __init__(self, parts: Parts, recipe: Recipe, cache: Path | None = None) -> None:
        """Freeze what is not trained and add LoRA layers or vectors. `parts` must not be used afterwards.

        Args:
            parts: the model; its networks are changed in place.
            recipe: what to train.
            cache: folder for the embeddings of captions by frozen text encoders.

        Raises:
            RequestError: if the recipe's targets match no layer, or it does not fit the model's prediction type.
        """
        super().__init__()
        self.recipe, self.parts = recipe, parts
        self.tokenizers = parts.tokenizers
        self.unet: UNet = parts.unet.requires_grad_(False).train()
        for name, encoder in zip(ENCODERS, parts.text_encoders, strict=False):
            self.add_module(name, encoder.requires_grad_(False).train())
        self.vectors = nn.ParameterList()
        self.controlnet: ControlNet | None = None
        config = samplers.resolve(None, parts.scheduler_config).schedule
        if recipe.prediction:
            config = config.model_copy(update={"prediction_type": recipe.prediction})
        if recipe.zero_snr:
            config = config.model_copy(update={"rescale_betas_zero_snr": True})
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise RequestError(
                "zero_snr is true and this model's prediction is epsilon, which cannot be learned at zero SNR; set "
                "prediction to v_prediction"
            )
        self.prediction_type = config.prediction_type
        self.schedule, self.prediction = Schedule.from_config(config), Prediction.from_config(config)
        self.texts = Texts(parts.tokenizers, parts.text_encoders, cache)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # LoRA's down matrices start random
            {
                "lora": self._add_lora,
                "full": self._unfreeze,
                "word": self._add_vectors,
                "controlnet": self._add_controlnet,
            }[self.change]()
        for parameter in self.trainable_parameters().values():
            parameter.data = parameter.data.float()  # updates are too small for 16 bits

    @property
    def change(self) -> str:
        """What is trained: "lora", "full", "word" (textual inversion), or "controlnet"."""
        recipe = self.recipe
        if recipe.method == "dreambooth":
            return recipe.change
        return {"textual-inversion": "word"}.get(recipe.method, recipe.method)

    @property
    def text_encoders(self) -> dict[str, CLIPTextModel]:
        """The text encoders by name, in the model's order."""
        return {name: cast(CLIPTextModel, getattr(self, name)) for name in ENCODERS if hasattr(self, name)}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by their names in its files."""
        return {"unet": self.unet, **self.text_encoders}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in module order."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of trained parameters and that of all parameters of the UNet and text encoders."""
        return sum(p.numel() for p in self.trainable_parameters().values()), count_parameters(self)

    def forward(
        self, batch: Batch | None, prior: Batch | None = None, shares: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """Return the mean loss of a batch plus the weighted loss of class pictures (Ruiz et al. 2022, eq. 2).

        Args:
            batch: pictures to train on; None for a part of a batch that has none.
            prior: class pictures.
            shares: of parts of batches, their shares of the whole.
        """
        loss = torch.zeros((), device=self.unet.conv_in.weight.device)
        for vectors in self.vectors:
            loss = loss + 0.0 * vectors.sum()  # if all captions are dropped, the gradient is 0 and not None
        for one, purpose, weight in (
            (batch, "train", shares[0]),
            (prior, "prior", shares[1] * self.recipe.prior_weight),
        ):
            if one is not None:
                drawn = self.draw_noise(one, purpose=purpose)
                losses = self.losses(one.latents, one.captions, one.time_ids, *drawn, one.hints)
                loss = loss + weight * losses.mean()
        return loss

    def losses(
        self,
        latents: Tensor,
        captions: Sequence[str],
        time_ids: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        hints: Tensor | None = None,
    ) -> Tensor:
        """Return each picture's loss (B,). latents and noise: (B, C, h, w), float32; timesteps: (B,); any device."""
        device = self.unet.conv_in.weight.device
        x0, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
        levels = torch.from_numpy(self.schedule.sigmas).float()
        sigma = levels.to(device)[timesteps].view(-1, 1, 1, 1)
        sample = (x0 + sigma * noise) / (sigma.square() + self.prediction.sigma_data**2).sqrt()
        sample = sample.to(self.unet.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        condition, residuals = self.encode_captions(captions, time_ids), {}
        if self.controlnet is not None:
            assert hints is not None
            features = self.controlnet.embed(hints.to(sample).contiguous(memory_format=torch.channels_last))
            down, mid = self.controlnet(sample, timesteps, condition, features)
            residuals = {"down_residuals": down, "mid_residual": mid}
        output = self.unet(sample, timesteps, condition, **residuals).float()
        error: Tensor = (output - self.prediction.target(x0, noise, sigma)).square().mean((1, 2, 3))
        return error * self._loss_weights(sigma.flatten())

    def draw_noise(self, batch: Batch, *, purpose: str = "train") -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) and noise (B, C, h, w), drawn for each picture from (seed, epoch, picture, purpose)."""
        timesteps, noises = [], []
        last = self.schedule.num_train_timesteps - 1
        for id, latents in zip(batch.ids, batch.latents, strict=True):
            rng = generator(self.recipe.seed, batch.epoch, id, purpose)
            if self.recipe.timesteps == "cubic":  # Mou et al. 2023, section 3.3
                share = 1 - torch.rand((), generator=rng, dtype=torch.float64) ** 3
                timesteps.append((share * self.schedule.num_train_timesteps).long().clamp(max=last))
            else:
                timesteps.append(torch.randint(last + 1, (), generator=rng))
            noise = torch.randn(latents.shape, generator=rng)
            if self.recipe.noise_offset:
                noise = noise + self.recipe.noise_offset * torch.randn(len(latents), 1, 1, generator=rng)
            noises.append(noise)
        return torch.stack(timesteps), torch.stack(noises)

    def encode_captions(self, captions: Sequence[str], time_ids: Tensor | None = None) -> Condition:
        """Encode captions for the UNet. Embeddings by frozen text encoders are cached."""
        trains_text = any(p.requires_grad for encoder in self.text_encoders.values() for p in encoder.parameters())
        weight = self.unet.conv_in.weight
        ids = time_ids if self.unet.config.addition_embed_type == "text_time" else None
        if not trains_text and not self.vectors:
            cached = self.texts(captions, keep=not self.recipe.shuffle_tags)
            return Condition(cached.context, cached.pooled, ids).to(weight.device, weight.dtype)
        rows = [self._encode(text) for text in captions]
        longest = max(row.context.shape[1] for row in rows)
        batch = Condition.cat([extend(row, longest) for row in rows])
        return Condition(batch.context, batch.pooled, ids).to(weight.device, weight.dtype)

    def _encode(self, text: str) -> Condition:
        """Encode one caption as generation does with plain syntax; a long one takes several windows."""
        word = {self.recipe.token.strip("<>").lower(): tuple(self.vectors)} if self.vectors else {}
        conditioner = Conditioner(self.tokenizers, list(self.text_encoders.values()), embeddings=word)
        condition: Condition = conditioner.encode(prompt.plan(text, "plain"))[0].timeline[0][1]
        return condition

    def _loss_weights(self, sigma: Tensor) -> Tensor:
        """Return each picture's weight in the loss (B,)."""
        if self.recipe.min_snr is None:
            return torch.ones_like(sigma)
        snr = sigma**-2
        capped = snr.clamp(max=self.recipe.min_snr)
        return {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[self.prediction_type]

    def _add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        recipe = self.recipe
        layers = [*recipe.targets, *(_conv_layers(self.unet) if recipe.convolutions else ())]
        target_layers = {"unet": layers} | (
            {name: list(TEXT_TARGETS) for name in self.text_encoders} if recipe.text_encoder else {}
        )
        for name, targets in target_layers.items():
            config = LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha or recipe.rank,  # type: ignore[arg-type]  # peft divides by the rank
                lora_dropout=recipe.lora_dropout,
                target_modules=targets,
            )
            try:
                inject_adapter_in_model(config, self.networks[name], ADAPTER)
            except ValueError as error:
                raise RequestError(
                    f"targets are {', '.join(targets)}; they match no layers of this model's {name}: {error}"
                ) from None

    def _unfreeze(self) -> None:
        self.unet.requires_grad_(True)
        if self.recipe.text_encoder:
            for encoder in self.text_encoders.values():
                encoder.requires_grad_(True)

    def _add_controlnet(self) -> None:
        recipe, unet = self.recipe, self.unet
        weight = unet.conv_in.weight
        if unet.config.in_channels != unet.config.out_channels:
            raise RequestError(
                f"this model's UNet takes {unet.config.in_channels} channels, as for inpainting; a ControlNet is "
                "trained with the model that it comes from"
            )
        if recipe.controlnet:
            files = scan_control(recipe.controlnet, unet.config)
            if not isinstance(files, ControlFiles):
                raise RequestError(f"controlnet is {recipe.controlnet[:200]!r}, a T2I-Adapter; it must be a ControlNet")
            if weight.is_meta:  # while memory is planned
                self.controlnet = cast(ControlNet, files.network.network()).to(weight.dtype)
            else:
                self.controlnet = files.load(unet, weight.dtype, weight.device, Placement())
        else:
            self.controlnet = ControlNet.from_unet(unet, recipe.condition_widths)
        for parameter in self.controlnet.parameters():
            parameter.data = parameter.data.clone()  # a Control-LoRA shares what it does not change with the UNet
        self.controlnet.requires_grad_(True).train()

    def _add_vectors(self) -> None:
        recipe = self.recipe
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders.values(), strict=True):
            table = encoder.text_model.embeddings.token_embedding.weight.detach().float()
            ids = tokenizer.encode(recipe.start)
            if len(ids) > recipe.vectors:
                words = ", ".join(repr(tokenizer.token(id).removesuffix("</w>")) for id in ids[:10])
                raise RequestError(
                    f"start is {recipe.start[:60]!r}, which is {len(ids)} tokens of this model ({words}), and vectors "
                    f"is {recipe.vectors}; choose a word that is one token, or set vectors to {len(ids)}"
                )
            if not ids:  # no initial word: near the mean of all embeddings
                rows = table.mean(0, keepdim=True) + 0.1 * table.std(0) * torch.randn(recipe.vectors, table.shape[1])
            else:
                rows = table[[ids[k % len(ids)] for k in range(recipe.vectors)]]
            self.vectors.append(nn.Parameter(rows.clone()))


@contextmanager
def swap_weights(model: TrainableModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace trained parameters by other values, such as their averages, inside the context."""
    parameters = model.trainable_parameters()
    before = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def merged_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict with its LoRA merged into the weights (in float32, rounded once)."""
    adapted = {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if ".lora_" in name:
            continue
        layer, base, leaf = name.rpartition(".base_layer.")
        if not base:
            state[name] = tensor.detach().clone()
        elif leaf == "weight":
            delta = _lora_delta(adapted[layer])
            state[f"{layer}.weight"] = (tensor.float() + delta.to(tensor.device)).to(tensor.dtype).detach()
        else:
            state[f"{layer}.{leaf}"] = tensor.detach().clone()
    return state


def lora_pairs(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the (down, up) matrices of a network's LoRA by layer, float32."""
    from peft.tuners.lora import LoraLayer

    return {
        name: (module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach())  # type: ignore[operator]
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }


def _lora_delta(layer: Any) -> Tensor:
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    change = up.flatten(1).float() @ down.flatten(1).float()
    return cast(Tensor, layer.scaling[ADAPTER] * change).view(layer.get_base_layer().weight.shape)


def _conv_layers(unet: UNet) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)]
