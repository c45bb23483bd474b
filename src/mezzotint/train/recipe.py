"""A recipe: all that says how a training run goes, as one frozen record. A TOML file with these names at its top:

    data = "pictures"
    steps = 1500
    rank = 16

What the command line says goes before the file, and the file before the method's own defaults. The run's folder keeps
the whole of it as recipe.toml, which is a recipe again. No torch here.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mezzotint.errors import RequestError

Method = Literal["lora", "full", "dreambooth", "textual-inversion"]

# Where a method's own value is another than the field's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"lr": 1e-5, "ema": 0.999},
    "dreambooth": {"caption_dropout": 0.0, "steps": 400},
    "textual-inversion": {"lr": 5e-3, "caption_dropout": 0.0, "weight_decay": 0.0},
}
# What may differ between a run and the one that goes on from its checkpoint.
FREE = ("data", "model", "class_folder", "cache", "validation", "save_every", "keep", "sample_every", "sample_prompts",
        "sample_seed", "validate_every", "log_every", "tensorboard", "checkpointing", "memory",
        "accumulate", "layout")  # fmt: skip


class Recipe(BaseModel):
    """One training run. Noise, timesteps, crops and dropout are functions of `seed`, the epoch and the picture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method = Field(description="lora, full, dreambooth or textual-inversion")
    model: str | None = Field(default=None, description="a model folder, file or hub id; without it the bundled model")

    # the pictures
    data: str = Field(description="a folder, Parquet file or WebDataset shards")
    resolution: int | None = Field(default=None, ge=16, le=4096, description="16 to 4096 (pixels); the model's native")
    buckets: bool = Field(default=True, description="true or false: each picture in about its own aspect ratio")
    bucket_step: int = Field(default=64, ge=8, le=512, multiple_of=8, description="a multiple of 8 (pixels)")
    random_crop: bool = Field(default=False, description="true or false (cut from the middle)")
    flip: bool = Field(default=False, description="true or false: half of the pictures mirrored")
    repeats: int = Field(default=1, ge=1, le=10_000, description="1 to 10,000 times each picture in an epoch")
    caption_dropout: float = Field(default=0.1, ge=0, le=1, description="a share from 0 to 1 of captions left empty")
    shuffle_tags: bool = Field(default=False, description="true or false: the caption's parts between commas, shuffled")
    keep_tags: int = Field(default=1, ge=0, description="a whole number: the first tags, which stay where they are")
    broken: Literal["stop", "skip"] = Field(default="stop", description="stop or skip: pictures that do not decode")
    cache: str | None = Field(default=None, description="a folder for encoded pictures; without it in the run's own")

    # how long and how fast
    steps: int = Field(default=1000, ge=1, le=10_000_000, description="a whole number from 1")
    batch: int = Field(default=1, ge=1, le=10_000, description="a whole number from 1 (pictures at once)")
    accumulate: int = Field(default=1, ge=1, le=10_000, description="a whole number from 1 (batches a step)")
    lr: float = Field(default=1e-4, gt=0, le=10, description="a number above 0")
    text_lr: float | None = Field(default=None, gt=0, le=10, description="a number above 0; without it that of lr")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="constant, cosine or linear"
    )
    warmup: int = Field(default=0, ge=0, description="a whole number (steps)")
    optimiser: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        default="adamw", description="adamw, adamw8bit or adafactor"
    )
    weight_decay: float = Field(default=1e-2, ge=0, le=10, description="a number from 0")
    clip: float = Field(default=1.0, ge=0, description="a number, the largest norm of a step's gradient; 0: any")
    ema: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 (none) to below 1")
    seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number from 0")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="float32 or bfloat16")
    checkpointing: bool = Field(default=False, description="true or false: less memory for a third more time")
    memory: str | None = Field(
        default=None, description="what the process may take, such as 4GiB, or auto: what is free"
    )

    # what is learnt
    text_encoder: bool = Field(default=False, description="true or false: whether the text encoders learn too")
    change: Literal["lora", "full"] = Field(default="lora", description="lora or full: what dreambooth trains")
    rank: int = Field(default=8, ge=1, le=4096, description="a whole number from 1")
    alpha: float | None = Field(default=None, gt=0, description="a number above 0; without it the rank")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 to below 1")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="ends of names of the UNet's layers"
    )
    convolutions: bool = Field(default=False, description="true or false: a change of the UNet's convolutions too")
    token: str = Field(default="<new>", min_length=1, max_length=100, description="the word that is learnt")
    start: str = Field(default="", max_length=200, description="a word to begin from")
    vectors: int = Field(default=1, ge=1, le=75, description="1 to 75 vectors")
    prompt: str | None = Field(default=None, description="the caption of pictures without their own")
    class_prompt: str | None = Field(default=None, description="what dreambooth must not forget, such as 'a dog'")
    class_folder: str | None = Field(default=None, description="a folder of pictures of that; what lacks is drawn")
    class_count: int = Field(default=50, ge=1, le=100_000, description="a whole number from 1")
    prior_weight: float = Field(default=1.0, ge=0, le=100, description="a number from 0")

    # what is minimised
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="epsilon or v_prediction; without it the model's own"
    )
    min_snr: float | None = Field(default=None, gt=0, description="a number above 0, 5 in the paper")
    noise_offset: float = Field(default=0.0, ge=0, le=1, description="a number from 0 to 1")
    zero_snr: bool = Field(default=False, description="true or false: the noise schedule ends in nothing but noise")

    # what is kept and shown
    save_every: int = Field(default=250, ge=1, description="a whole number from 1 (steps)")
    layout: Literal["folder", "file", "both"] = Field(
        default="folder", description="folder, file or both: a whole model as diffusers' folder or one original file"
    )
    keep: int = Field(default=2, ge=1, description="a whole number from 1 (checkpoints)")
    log_every: int = Field(default=10, ge=1, description="a whole number from 1 (steps)")
    tensorboard: bool = Field(default=True, description="true or false: logs for TensorBoard where it is installed")
    sample_every: int = Field(default=0, ge=0, description="a whole number (steps); 0: never")
    sample_prompts: tuple[str, ...] = Field(default=(), description="a list of prompts")
    sample_seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number from 0")
    validate_every: int = Field(default=0, ge=0, description="a whole number (steps); 0: never")
    validation: str | None = Field(default=None, description="pictures held out, as data is given")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.method == "dreambooth" and not self.prompt:
            raise RequestError("dreambooth needs prompt, with a rare word for the subject: 'a photo of sks dog'")
        if self.method == "textual-inversion" and self.prompt and self.token not in self.prompt:
            raise RequestError(f"prompt is {self.prompt[:60]!r}; it must have the token in it, {self.token}")
        if self.zero_snr and self.prediction == "epsilon":
            raise RequestError("zero_snr is true and prediction 'epsilon': of pure noise epsilon says nothing; "
                               "prediction must be v_prediction")  # fmt: skip
        if self.validate_every and not self.validation:
            raise RequestError("validate_every is given and validation is not: name the pictures held out")
        if self.sample_every and not self.sample_prompts:
            raise RequestError("sample_every is given and sample_prompts is not: name prompts")
        return self

    @classmethod
    def of(cls, method: str, path: Path | None = None, given: Mapping[str, Any] | None = None) -> Self:
        """The recipe of a file, if there is one, with what is `given` instead of what it says.

        Raises RequestError: a file that cannot be read or is no TOML, a name that no recipe has (with the nearest), a
        value that cannot be.
        """
        fields = {} if path is None else _read(path)
        if fields.pop("method", method) != method:
            raise RequestError(f"{path} is a recipe of another method; the command's is {method}")
        try:
            return cls.model_validate({**DEFAULTS.get(method, {}), **fields, **(given or {}), "method": method})
        except ValidationError as error:
            raise RequestError(_sentences(error)) from None

    def toml(self) -> str:
        """The whole of it, which `of` reads again; a field without a value is a comment."""
        return "".join(_line(name, value) for name, value in self)

    def differences(self, other: Recipe) -> list[str]:
        """What keeps a run of one from going on with the other, as "name: 1 and 2". A longer run may, unless the
        rate's schedule looks at its end."""
        free = {*FREE, *(("steps",) if self.schedule == other.schedule == "constant" else ())}
        pairs = ((name, value, getattr(other, name)) for name, value in self)
        return [f"{name}: {a!r} and {b!r}" for name, a, b in pairs if a != b and name not in free]


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """{"steps": 20} from ["steps=20"]; a value that is no TOML is a text. Raises RequestError."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, mark, value = (part.strip() for part in text.partition("="))
        if not mark:
            raise RequestError(f"set is {text[:60]!r}; it must be NAME=VALUE, such as steps=20")
        try:
            fields[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            fields[name] = value
    return fields


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is no TOML: {error}") from None


def _line(name: str, value: Any) -> str:
    if value is None:
        return f"# {name} =\n"
    return f"{name} = {json.dumps(value, ensure_ascii=False)}\n"  # for these types JSON is TOML


def _sentences(error: ValidationError) -> str:
    """pydantic's findings as sentences: which name, what it is, what it must be."""
    found = []
    for finding in error.errors():
        name = str(finding["loc"][0])
        if finding["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, Recipe.model_fields, n=3)
            hint = f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(Recipe.model_fields)}"
            found.append(f"a recipe has no {name[:60]!r}; {hint}")
        else:
            state = "is missing" if finding["type"] == "missing" else f"is {str(finding['input'])[:60]!r}"
            found.append(f"{name} {state}; it must be {Recipe.model_fields[name].description}")
    return ". ".join(dict.fromkeys(found[:5]))
