"""Options that overrule what is detected in the files of a model. Importing this does not import torch.

    mezzotint.load("model.safetensors", prediction="v_prediction", vae="vae.safetensors")
    mezzotint generate "a lemon" --model model.safetensors --prediction v_prediction --vae vae.safetensors

Every function that opens a model takes these options as keyword arguments, and every command as options.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.errors import LOAD_ALIASES, CheckpointError, RequestError, suggest

if TYPE_CHECKING:
    from pydantic import BaseModel

FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")  # what `config` may name

ConfigFields = Mapping[str, Mapping[str, Any]]  # part -> fields of its config


@dataclass(frozen=True)
class ModelOptions:
    """The options that overrule what is found in a model's files; None leaves it to the files.

    Attributes:
        prediction: What the UNet predicts: "epsilon", "v_prediction" or "sample".
        family: "sd1", "sd2" or "sdxl".
        variant: Variant of a folder's weights, such as "fp16". By default the plain files, or fp16 if there are only
            those.
        config: Config fields by part (unet, vae, text_encoder, text_encoder_2, scheduler), such as
            {"unet": {"attention_head_dim": 4}}.
        vae: VAE to use instead of the model's own, or where it has none: a file, a folder or a hub id.
        safety_checker: Safety checker to use: a folder or a hub id; True is the model's own, if it has one, and None
            (as in diffusers) or False is none.

    Raises:
        CheckpointError: If an option has a value that it cannot have.
    """

    prediction: str | None = None
    family: str | None = None
    variant: str | None = None
    config: ConfigFields | None = None
    vae: str | Path | None = None
    safety_checker: str | Path | bool | None = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("family", self.family, FAMILIES),
            ("prediction", self.prediction, PREDICTION_TYPES),
            *(("config", part, PARTS) for part in self.config or ()),
        ):
            if value is not None and value not in known:
                raise CheckpointError(f"{name} is {str(value)[:60]!r}; it must be one of {', '.join(known)}")
        if self.config:
            self._check_fields()

    def _check_fields(self) -> None:
        """Check that each field of `config` is read, except those of the scheduler, which depend on its class."""
        from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig  # pydantic, which takes a while to import

        known: dict[str, type[BaseModel]] = {"unet": UNetConfig, "vae": VAEConfig}
        for part in PARTS[:-1]:
            names = known.get(part, CLIPConfig).model_fields
            for field in self.config_of(part):
                if field not in names:
                    near = get_close_matches(str(field)[:100], names, 1) or names
                    raise CheckpointError(
                        f"config names {part}.{str(field)[:60]}, which is not read; it has {', '.join(near)}"
                    )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ModelOptions:
        """Make the options from the keyword arguments of a function that opens a model.

        Raises:
            RequestError: If one is unknown; the message says what it is called here.
            CheckpointError: If one has a value that it cannot have.
        """
        names = ("device", "dtype", "placement", "memory", *(field.name for field in fields(cls)))
        if unknown := [name for name in options if name not in {field.name for field in fields(cls)}]:
            raise RequestError(f"load has no argument {unknown[0]!r}; {suggest(unknown[0], LOAD_ALIASES, names)}")
        return cls(**options)

    def config_of(self, part: str) -> Mapping[str, Any]:
        """Return the config fields of a part that are overruled."""
        return (self.config or {}).get(part, {})

    def values(self) -> dict[str, Any]:
        """Return the options that are set and name no file, as JSON values."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in FILE_OPTIONS}
        return {name: value for name, value in given.items() if value}


FILE_OPTIONS = ("vae", "safety_checker")  # options that name a file or folder, of which no path is kept in a record


def parse_config(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Parse ["unet.attention_head_dim=4"] to {"unet": {"attention_head_dim": 4}}.

    Args:
        assignments: PART.FIELD=VALUE; a value that is not JSON is a string.

    Raises:
        RequestError: If one has another form.
    """
    config: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, mark, value = (piece.strip() for piece in text.partition("="))
        part, dot, field = name.partition(".")
        if not (mark and dot and field and part in PARTS):
            raise RequestError(
                f"config is {text[:60]!r}; it must be PART.FIELD=VALUE with one of {', '.join(PARTS)}, such as "
                "unet.attention_head_dim=4"
            )
        try:
            config.setdefault(part, {})[field] = json.loads(value)
        except (ValueError, RecursionError):
            config.setdefault(part, {})[field] = value
    return config
