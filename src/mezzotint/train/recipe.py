"""A training recipe: every setting of a run, in one frozen record.

As a TOML file:

    data = "pictures"
    steps = 1500
    rank = 16

The command line overrides the file, and the file the method's defaults. The run's folder keeps the complete recipe as
recipe.toml, which can be used as a recipe again. This module does not import torch.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mezzotint.errors import RequestError
from mezzotint.files import read_text
from mezzotint.model_options import parse_config

Method = Literal["lora", "full", "dreambooth", "textual-inversion", "controlnet"]

# Defaults of a method that differ from the field's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"lr": 1e-5, "ema": 0.999},
    "dreambooth": {"caption_dropout": 0.0, "steps": 400},
    "textual-inversion": {"lr": 5e-3, "caption_dropout": 0.0, "weight_decay": 0.0},
    "controlnet": {"lr": 1e-5},
}
# Fields that may change when a run is resumed.
FREE = ("data", "conditions", "model", "variant", "vae", "class_folder", "cache", "validation", "save_every", "keep",
        "sample_every", "sample_prompts", "sample_conditions", "sample_seed", "validate_every", "log_every",
        "tensorboard", "checkpointing", "memory", "accumulate", "layout")  # fmt: skip


class Recipe(BaseModel):
    """The settings of a training run. Noise, timesteps, crops and dropout depend only on `seed`, epoch and picture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method = Field(description="lora, full, dreambooth, textual-inversion or controlnet")
    model: str | None = Field(default=None, description="a model folder, file or hub id (unset: the bundled model)")
    family: str | None = Field(default=None, description="sd1, sd2 or sdxl (unset: by the model's tensors)")
    variant: str | None = Field(default=None, description="a variant of the model folder's weights, such as fp16")
    config: tuple[str, ...] = Field(
        default=(), description="a list of PART.FIELD=VALUE for the model's configs, such as unet.attention_head_dim=4"
    )
    vae: str | None = Field(default=None, description="a VAE file, folder or hub id (unset: the model's own)")

    # data
    data: str = Field(description="a folder, Parquet file or WebDataset shards")
    conditions: str | None = Field(
        default=None,
        description="a folder of conditioning pictures, each under its picture's name (unset: the data names them)",
    )
    resolution: int | None = Field(
        default=None,
        ge=16,
        le=4096,
        description="a whole number of pixels from 16 to 4096 (unset: the model's native resolution)",
    )
    buckets: bool = Field(default=True, description="true or false: keep aspect ratios with aspect-ratio buckets")
    bucket_step: int = Field(
        default=64, ge=8, le=512, multiple_of=8, description="a multiple of 8 from 8 to 512 (pixels)"
    )
    random_crop: bool = Field(default=False, description="true or false: crop at random instead of in the middle")
    flip: bool = Field(default=False, description="true or false: mirror half of the pictures")
    repeats: int = Field(
        default=1, ge=1, le=10_000, description="a whole number from 1 to 10,000: uses of each picture per epoch"
    )
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="a number from 0 to 1: fraction of captions replaced by the empty one"
    )
    shuffle_tags: bool = Field(
        default=False, description="true or false: shuffle the comma-separated parts of captions"
    )
    keep_tags: int = Field(default=1, ge=0, description="a whole number from 0: how many first tags are not shuffled")
    broken: Literal["stop", "skip"] = Field(
        default="stop", description="stop or skip: what to do about pictures that do not decode"
    )
    cache: str | None = Field(
        default=None, description="a folder for encoded pictures and captions (unset: in the run's folder)"
    )

    # optimisation
    steps: int = Field(default=1000, ge=1, le=10_000_000, description="a whole number from 1 to 10,000,000")
    batch: int = Field(default=1, ge=1, le=10_000, description="a whole number from 1 to 10,000: pictures per batch")
    accumulate: int = Field(default=1, ge=1, le=10_000, description="a whole number from 1 to 10,000: batches per step")
    lr: float = Field(default=1e-4, gt=0, le=10, description="a number above 0 and at most 10: learning rate")
    text_lr: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="a number above 0 and at most 10: learning rate of the text encoders (unset: lr)",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="constant, cosine or linear: learning rate schedule"
    )
    warmup: int = Field(default=0, ge=0, description="a whole number from 0: steps of linear warmup")
    optimiser: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        default="adamw", description="adamw, adamw8bit or adafactor"
    )
    weight_decay: float = Field(default=1e-2, ge=0, le=10, description="a number from 0 to 10")
    clip: float = Field(default=1.0, ge=0, description="a number from 0: largest norm of the gradient (0: no clipping)")
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="a number from 0 to below 1: decay of the averaged weights (0: none)"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number from 0 to 2**63 - 1")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="float32 or bfloat16")
    checkpointing: bool = Field(
        default=False,
        description="true or false: gradient checkpointing, which takes less memory and a third more time",
    )
    memory: str | None = Field(default=None, description="a size such as 4GiB, or auto: memory budget of the process")

    # what is trained
    text_encoder: bool = Field(default=False, description="true or false: train the text encoders too")
    change: Literal["lora", "full"] = Field(default="lora", description="lora or full: what dreambooth trains")
    rank: int = Field(default=8, ge=1, le=4096, description="a whole number from 1 to 4096: rank of the LoRA")
    alpha: float | None = Field(default=None, gt=0, description="a number above 0: LoRA alpha (unset: the rank)")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 to below 1")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="a list of endings of UNet layer names"
    )
    convolutions: bool = Field(default=False, description="true or false: add LoRA to the UNet's convolutions too")
    token: str = Field(default="<new>", min_length=1, max_length=100, description="a new word of 1 to 100 characters")
    start: str = Field(
        default="",
        max_length=200,
        description="existing words of at most 200 characters, each token of which initialises a vector of the token",
    )
    vectors: int = Field(default=1, ge=1, le=75, description="a whole number from 1 to 75: vectors of the token")
    controlnet: str | None = Field(
        default=None,
        description="a ControlNet's folder, file or hub id to start from (unset: a copy of the UNet's encoder)",
    )
    condition_widths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(16, 32, 96, 256),
        min_length=2,
        description="a list of whole numbers: widths of the convolutions that read the conditioning picture",
    )
    prompt: str | None = Field(default=None, description="a caption for pictures that have none")
    class_prompt: str | None = Field(
        default=None, description="a prompt for class pictures (prior preservation), such as 'a dog'"
    )
    class_folder: str | None = Field(default=None, description="a folder of class pictures; missing ones are generated")
    class_count: int = Field(
        default=50, ge=1, le=100_000, description="a whole number from 1 to 100,000: class pictures"
    )
    prior_weight: float = Field(
        default=1.0, ge=0, le=100, description="a number from 0 to 100: weight of the class pictures' loss"
    )

    # loss
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="epsilon or v_prediction (unset: the model's own)"
    )
    min_snr: float | None = Field(
        default=None, gt=0, description="a number above 0: Min-SNR's gamma, 5 in the paper (unset: no weighting)"
    )
    noise_offset: float = Field(default=0.0, ge=0, le=1, description="a number from 0 to 1: noise offset")
    timesteps: Literal["uniform", "cubic"] = Field(
        default="uniform",
        description="uniform, or cubic: more of those with much noise, which decide the layout",
    )
    zero_snr: bool = Field(default=False, description="true or false: rescale the schedule to zero terminal SNR")

    # output
    save_every: int = Field(default=250, ge=1, description="a whole number from 1: steps between checkpoints")
    layout: Literal["folder", "file", "both"] = Field(
        default="folder", description="folder, file or both: save a full model as diffusers folder or single file"
    )
    keep: int = Field(default=2, ge=1, description="a whole number from 1: checkpoints to keep")
    log_every: int = Field(default=10, ge=1, description="a whole number from 1: steps between lines of the log")
    tensorboard: bool = Field(default=True, description="true or false: log to TensorBoard if it is installed")
    sample_every: int = Field(default=0, ge=0, description="a whole number of steps (0: never)")
    sample_prompts: tuple[str, ...] = Field(default=(), description="a list of prompts")
    sample_conditions: tuple[str, ...] = Field(
        default=(), description="a list of the sample prompts' conditioning pictures, of a ControlNet"
    )
    sample_seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number from 0 to 2**63 - 1")
    validate_every: int = Field(default=0, ge=0, description="a whole number of steps (0: never)")
    validation: str | None = Field(default=None, description="held-out pictures, given like data")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.method == "dreambooth" and not self.prompt:
            raise RequestError("prompt is missing; dreambooth needs one with a rare word, such as 'a photo of sks dog'")
        if self.method == "textual-inversion" and self.prompt and self.token not in self.prompt:
            raise RequestError(f"prompt is {self.prompt[:60]!r}; it must contain the token {self.token}")
        if self.zero_snr and self.prediction == "epsilon":
            raise RequestError("zero_snr is true and prediction is 'epsilon'; prediction must be v_prediction")
        if self.validate_every and not self.validation:
            raise RequestError("validate_every is set and validation is not; it must name held-out pictures")
        if self.sample_every and not self.sample_prompts:
            raise RequestError("sample_every is set and sample_prompts is not; it must be a list of prompts")
        if self.method == "controlnet":
            if self.sample_every and len(self.sample_conditions) != len(self.sample_prompts):
                raise RequestError(
                    f"sample_conditions has {len(self.sample_conditions)} pictures and sample_prompts "
                    f"{len(self.sample_prompts)} prompts; each prompt must have one"
                )
            for name in ("text_encoder", "prediction", "zero_snr"):
                if getattr(self, name):
                    raise RequestError(f"{name} is set, which a ControlNet cannot change; leave it unset")
        elif self.conditions or self.controlnet or self.sample_conditions:
            raise RequestError(f"conditions are for the method controlnet; the method is {self.method}")
        return self

    @classmethod
    def of(cls, method: str, path: Path | None = None, given: Mapping[str, Any] | None = None) -> Self:
        """Read a recipe.

        Args:
            method: the training method.
            path: a TOML file.
            given: values that override the file's.

        Raises:
            RequestError: for a file that is not readable or not TOML, an unknown field, or a value out of range.
        """
        fields = {} if path is None else _read(path)
        if fields.pop("method", method) != method:
            raise RequestError(f"{path} is a recipe of another method; its method must be {method}")
        try:
            return cls.model_validate({**DEFAULTS.get(method, {}), **fields, **(given or {}), "method": method})
        except ValidationError as error:
            raise RequestError(_sentences(error)) from None

    @property
    def model_options(self) -> dict[str, Any]:
        """The options to open the model with, without its safety checker.

        `prediction` is what it is trained to predict, whatever it did before.
        """
        given = {"family": self.family, "variant": self.variant, "config": parse_config(self.config), "vae": self.vae}
        return {"safety_checker": None, **{name: value for name, value in given.items() if value}}

    def toml(self) -> str:
        """Return the recipe as TOML, which `of` reads; unset fields are comments."""
        return "".join(_line(name, value) for name, value in self)

    def differences(self, other: Recipe) -> list[str]:
        """Return the differences, as "name: 1 and 2", that keep a run of one recipe from being resumed with the other.

        The number of steps may change only if the learning rate does not depend on it.
        """
        free = {*FREE, *(("steps",) if self.schedule == other.schedule == "constant" else ())}
        pairs = ((name, value, getattr(other, name)) for name, value in self)
        return [f"{name}: {a!r} and {b!r}" for name, a, b in pairs if a != b and name not in free]


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ["steps=20"] to {"steps": 20}; a value that is not TOML is a string. Raises RequestError."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, mark, value = (part.strip() for part in text.partition("="))
        if not mark:
            raise RequestError(f"set is {text[:60]!r}; it must be NAME=VALUE, such as steps=20")
        try:
            fields[name] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):  # not TOML, too many digits, or nested too deeply
            fields[name] = value
    return fields


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # ValueError: also of bytes and of a number of too many digits
        raise RequestError(f"{path} is not valid TOML: {error}") from None


def _line(name: str, value: Any) -> str:
    if value is None:
        return f"# {name} =\n"
    return f"{name} = {json.dumps(value, ensure_ascii=False)}\n"  # for these types JSON is TOML


def _sentences(error: ValidationError) -> str:
    """Turn pydantic's errors into sentences: field, value, what it must be."""
    found = []
    for finding in error.errors():
        name = str(finding["loc"][0])
        if finding["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, Recipe.model_fields, n=3)
            hint = f"the nearest are {', '.join(near)}" if near else f"the fields are {', '.join(Recipe.model_fields)}"
            found.append(f"a recipe has no field {name[:60]!r}; {hint}")
        else:
            value = finding["input"]
            written = f"{value:g}" if isinstance(value, float) else repr(str(value)[:60])
            state = "is missing" if finding["type"] == "missing" else f"is {written}"
            found.append(f"{name} {state}; it must be {Recipe.model_fields[name].description}")
    return ". ".join(dict.fromkeys(found[:5]))
