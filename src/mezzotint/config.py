"""Model configurations, read from the config.json files of a diffusers folder. No torch here.

Field names and defaults are those of diffusers and transformers, so a hub configuration validates unchanged; keys that
are not used are ignored. Values that files give as one number or a list are tuples here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

# far above any model's numbers, and low enough that no product of two needs more memory than an address space has
Size = Annotated[int, Field(ge=1, le=2**20)]  # channels, widths, entries of a table
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)]  # one per level
Layers = Annotated[int, Field(ge=0, lt=2**31)]  # which a file's number of tensors bounds further
Numbers = Layers | Annotated[tuple[Layers, ...], Field(min_length=1, max_length=16)]
Heads = Size | Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0.0, le=1e6)]
Shift = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
Epsilon = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Side = Annotated[int, Field(ge=1, le=4096)]  # pixels
Depths = Annotated[tuple[Numbers, ...], Field(min_length=1, max_length=16)]  # by level; a tuple is by layer

# Fields of diffusers' UNet2DConditionModel that the UNet has in one form only; another form has other layers.
ONLY_UNET_FORM: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class CLIPConfig(_Config):
    """A CLIP text encoder (`text_encoder/config.json`)."""

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    projection_dim: Size = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Size = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId | None = 49407  # 2 in old files, where the pooled vector is taken at the highest id
    pad_token_id: TokenId | None = 1
    architectures: tuple[str, ...] = ("CLIPTextModel",)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        return self

    @property
    def has_projection(self) -> bool:
        """Whether the pooled vector is projected: CLIPTextModelWithProjection (SDXL's second encoder)."""
        return "CLIPTextModelWithProjection" in self.architectures


class CLIPVisionConfig(_Config):
    """A CLIP vision encoder (transformers' CLIPVisionModel and CLIPVisionModelWithProjection)."""

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    projection_dim: Count = 512
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12
    num_attention_heads: Count = 12
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def positions(self) -> int:
        """Length of the sequence: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.patch_size > self.image_size:
            raise ValueError("patch_size must be at most image_size")
        return self


class SafetyCheckerConfig(_Config):
    """A safety checker (`safety_checker/config.json`, diffusers' StableDiffusionSafetyChecker).

    Attributes:
        vision_config: The vision encoder; old files have it as `vision_config_dict`, which takes precedence.
        projection_dim: Size of the embedding space of pictures and concepts.
        concepts: Number of concepts that flag a picture. Not in the file: the rows of `concept_embeds`.
        special_care: Number of concepts that lower the other thresholds: the rows of `special_care_embeds`.
    """

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: Count = 512
    concepts: Count
    special_care: Count

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the vision encoder."""
        return self.vision_config.num_hidden_layers

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            given = fields.get("vision_config_dict")
            vision = given if given is not None else fields.get("vision_config")
            return {**fields, "vision_config": vision if vision is not None else {}}
        return fields


class ImageProcessorConfig(_Config):
    """How pictures become the input of a CLIP vision encoder (`preprocessor_config.json`, CLIPImageProcessor).

    Attributes:
        size: (height, width) to resize to, or the length of the shortest edge.
        crop_size: (height, width) of the centre crop.
        resample: The filter, by Pillow's number.
    """

    do_resize: bool = True
    size: Side | tuple[Side, Side] = 224
    resample: Annotated[int, Field(ge=0, le=5)] = 3
    do_center_crop: bool = True
    crop_size: tuple[Side, Side] = (224, 224)
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[Shift, Shift, Shift] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP
    image_std: tuple[Deviation, Deviation, Deviation] = (0.26862954, 0.26130258, 0.27577711)

    @field_validator("size", "crop_size", mode="before")
    @classmethod
    def _read_size(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict):
            if set(value) == {"height", "width"}:
                return value["height"], value["width"]
            if set(value) == {"shortest_edge"} and info.field_name == "size":
                return value["shortest_edge"]
            raise ValueError("a size must have height and width, or shortest_edge")
        return (value, value) if isinstance(value, int) and info.field_name == "crop_size" else value


class UNetConfig(_Config):
    """A cross-attention UNet (`unet/config.json`, UNet2DConditionModel). Tuples start at the top level."""

    sample_size: Annotated[int, Field(ge=1, le=1024)] | None = None  # of the latents; a picture has at most 8192 pixels
    in_channels: Size = 4
    out_channels: Size = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=-1000, le=1000)] = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: Sizes = (320, 640, 1280, 1280)
    layers_per_block: Numbers = 2
    cross_attention_dim: Size = 1280
    transformer_layers_per_block: Layers | Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None  # of the up blocks, from the bottom level
    attention_head_dim: Heads = 8  # the number of heads, despite its name (a historic mistake of diffusers)
    num_attention_heads: Heads | None = None
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    upcast_attention: bool = False
    norm_num_groups: Size = 32
    norm_eps: Epsilon = 1e-5
    act_fn: str = "silu"
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Size | None = None
    projection_class_embeddings_input_dim: Size | None = None
    time_cond_proj_dim: Size | None = None  # guidance embedding of LCM models

    def per_level(self, value: Numbers) -> tuple[int, ...]:
        """Return one value per level, from the top."""
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads per level, from the top."""
        return self.per_level(self.num_attention_heads or self.attention_head_dim)

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Number of transformer blocks in each layer of each down block; 0 in blocks without attention."""
        return _layer_depths(self._level_depths, self.per_level(self.layers_per_block), self.down_block_types)

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """Number of transformer blocks in each layer of each up block, the first at the bottom level."""
        depths = self.reverse_transformer_layers_per_block or self._level_depths[::-1]
        layers = tuple(count + 1 for count in reversed(self.per_level(self.layers_per_block)))
        return _layer_depths(depths, layers, self.up_block_types)

    @property
    def mid_depth(self) -> int | None:
        """Number of transformer blocks in the middle block; 0 if it is one residual block, None if there is none."""
        if self.mid_block_type in (None, "UNetMidBlock2D"):
            return None if self.mid_block_type is None else 0
        lowest = self._level_depths[-1]
        return lowest if isinstance(lowest, int) else lowest[0]

    @property
    def self_attentions(self) -> list[str]:
        """Names of the self-attentions, as in diffusers."""
        blocks: dict[str, tuple[int, ...]] = {"mid_block": (self.mid_depth or 0,)}
        blocks |= {f"down_blocks.{k}": depths for k, depths in enumerate(self.down_depths)}
        blocks |= {f"up_blocks.{k}": depths for k, depths in enumerate(self.up_depths)}
        return [
            f"{block}.attentions.{k}.transformer_blocks.{n}.attn1"
            for block, depths in blocks.items()
            for k, depth in enumerate(filter(None, depths))
            for n in range(depth)
        ]

    @property
    def _level_depths(self) -> Depths:
        depths = self.transformer_layers_per_block
        return (depths,) * len(self.block_out_channels) if isinstance(depths, int) else depths

    @model_validator(mode="before")
    @classmethod
    def _has_our_form(cls, fields: Any) -> Any:
        for name, known in ONLY_UNET_FORM.items():
            if isinstance(fields, dict) and name in fields and fields[name] not in known:
                raise ValueError(f"{name} is {str(fields[name])[:60]!r}; a UNet with it is not supported")
        return fields

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ValueError("down_block_types, up_block_types and block_out_channels must have one entry per level")
        return self


class ControlNetConfig(UNetConfig):
    """A ControlNet (`config.json` of diffusers' ControlNetModel): the way down of a UNet, and what it adds to it."""

    conditioning_channels: Size = 3
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    conditioning_embedding_out_channels: Annotated[Sizes, Field(min_length=2)] = (16, 32, 96, 256)
    global_pool_conditions: bool = False

    @model_validator(mode="before")
    @classmethod
    def _has_no_way_up(cls, fields: Any) -> Any:
        levels = len(fields.get("block_out_channels", (None,) * 4)) if isinstance(fields, dict) else 0
        return {**fields, "up_block_types": ("UpBlock2D",) * levels} if levels else fields

    @property
    def downscale(self) -> int:
        """Pixels of the conditioning picture per latent along one side."""
        return 1 << (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetUnionConfig(ControlNetConfig):
    """A ControlNet Union (`config.json` of diffusers' ControlNetUnionModel)."""

    conditioning_embedding_out_channels: Annotated[Sizes, Field(min_length=2)] = (48, 96, 192, 384)
    num_control_type: Annotated[int, Field(ge=1, le=64)] = 6
    num_trans_channel: Size = 320
    num_trans_layer: Layers = 1
    num_proj_channel: Size = 320

    @model_validator(mode="after")
    def _widths_agree(self) -> Self:
        if {self.num_trans_channel, self.num_proj_channel} != {self.block_out_channels[0]}:
            raise ValueError("num_trans_channel and num_proj_channel must be the first of block_out_channels")
        if not self.addition_time_embed_dim:
            raise ValueError("addition_time_embed_dim is missing, which embeds the types")
        return self


class T2IAdapterConfig(_Config):
    """A T2I-Adapter (`config.json` of diffusers' T2IAdapter)."""

    in_channels: Literal[1, 3] = 3
    channels: Sizes = (320, 640, 1280, 1280)
    num_res_blocks: Layers = 2
    downscale_factor: Annotated[int, Field(ge=1, le=256)] = 8
    adapter_type: Literal["full_adapter", "full_adapter_xl", "light_adapter"] = "full_adapter"

    @property
    def features(self) -> list[tuple[int, int]]:
        """Channels of each feature, and pixels of the picture to one place of it along a side."""
        if self.adapter_type == "full_adapter_xl":
            powers, widths = [int(k >= 2) for k in range(len(self.channels))], self.channels
        else:
            widths = self.channels + self.channels[-1:] * (self.adapter_type == "light_adapter")
            powers = list(range(len(widths)))
        return [(width, self.downscale_factor << power) for width, power in zip(widths, powers, strict=True)]


def _layer_depths(depths: Depths, layers: tuple[int, ...], kinds: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the depth of each layer of each block; `depths`, `layers` (their numbers) and `kinds` are by block."""
    return tuple(
        (0,) * count if not kind.startswith("CrossAttn") else (depth,) * count if isinstance(depth, int) else depth
        for depth, count, kind in zip(depths, layers, kinds, strict=True)
    )


class VAEConfig(_Config):
    """A KL autoencoder (`vae/config.json`, diffusers' AutoencoderKL)."""

    in_channels: Size = 3
    out_channels: Size = 3
    block_out_channels: Sizes = (64,)
    layers_per_block: Layers = 1
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    sample_size: Size = 32
    scaling_factor: Positive = 0.18215
    shift_factor: Shift | None = None
    latents_mean: tuple[Shift, ...] | None = None  # per channel, as latents_std; the UNet denoises normalized latents
    latents_std: tuple[Shift, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _latents_agree(self) -> Self:
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None) or any(len(v) != self.latent_channels for v in (mean, std) if v is not None):
            raise ValueError("latents_mean and latents_std must both have one number per latent channel")
        if std and min(std) <= 0.0:
            raise ValueError("latents_std must be above 0")
        return self

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side (8 for Stable Diffusion)."""
        return 1 << (len(self.block_out_channels) - 1)


class TinyVAEConfig(VAEConfig):
    """A TAESD autoencoder (`vae/config.json`, diffusers' AutoencoderTiny), whose levels all have one width."""

    encoder_block_out_channels: Sizes = (64,) * 4
    decoder_block_out_channels: Sizes = (64,) * 4
    num_encoder_blocks: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=16)] = (1, 3, 3, 3)
    num_decoder_blocks: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=16)] = (3, 3, 3, 1)
    act_fn: Literal["relu"] = "relu"
    upsample_fn: Literal["nearest"] = "nearest"
    upsampling_scaling_factor: Literal[2] = 2
    norm_num_groups: Size = 1  # it has no norms
    scaling_factor: Positive = 1.0
    force_upcast: bool = False

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        widths, blocks = zip(
            (self.encoder_block_out_channels, self.num_encoder_blocks),
            (self.decoder_block_out_channels, self.num_decoder_blocks),
            strict=True,
        )
        if len({*map(len, widths), *map(len, blocks)}) > 1 or any(len({*each}) > 1 for each in widths):
            raise ValueError("encoder and decoder must have as many levels, and each one width at all of them")
        return self

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side (8 for Stable Diffusion)."""
        return 1 << (len(self.num_decoder_blocks) - 1)


class ScheduleConfig(_Config):
    """The training noise schedule in `scheduler/scheduler_config.json`. samplers/ reads the sampler."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: Annotated[tuple[Beta, ...], Field(min_length=2, max_length=100_000)] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    terminal_alpha: float = Field(default=2.0**-24, gt=0, lt=1)  # for a last alpha_bar of zero; sigma 4096 in diffusers
    float32_table: bool = False  # as diffusers rounds it, which matters for a Brownian path in sigma
    sigma_data: Positive | None = None  # if set, the model has EDM's preconditioning (Karras et al. 2022) and no betas
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    rho: Positive = 7.0

    @field_validator("trained_betas", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value
