"""Pictures as prompts of a Request, by IP-Adapters. Does not import torch.

mezzotint.Request("a portrait", ip_adapter=[{"file": "ip-adapter_sd15.safetensors", "image": "face.png", "scale": 0.6}])
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike, fspath
from typing import Annotated, Any

from pydantic import Field, field_serializer, field_validator, model_validator

from mezzotint.entries.fields import Entry, Name, Picture, Share, as_tuples, given_fields, picture_source, to_uri

MAX_PICTURES = 16
TENSOR = "image_embeds"  # name of the tensor in a file of embeddings

Amount = Annotated[float, Field(ge=-100.0, le=100.0)]
Block = Annotated[str, Field(pattern=r"^(mid|(down|up)(\.block_\d{1,3})?)$")]
Leaf = Amount | Annotated[tuple[Amount, ...], Field(min_length=1, max_length=MAX_PICTURES)]  # or of each picture
Layers = Amount | Annotated[tuple[Leaf, ...], Field(min_length=1, max_length=100)]  # or of each transformer
BlockScales = Annotated[tuple[tuple[Block, Layers], ...], Field(min_length=1, max_length=100)]
Pictures = Annotated[tuple[Picture, ...], Field(min_length=1, max_length=MAX_PICTURES)]

_LIST = f"a picture, or a list of at most {MAX_PICTURES}: paths of files, their bytes, or PIL images"


class IPAdapter(Entry):
    """An IP-Adapter of a Request, and the pictures that it makes prompts of.

    Attributes:
        file: A file, a folder or a hub id, which may go on with a path inside of the repository.
        image: The pictures; None if `embeds` are given.
        embeds: What the encoder makes of the pictures, computed before: a file that `mezzotint.embed_images` wrote.
        encoder: The CLIP vision encoder, likewise; None looks for a folder image_encoder near `file`.
        scale: Factor of what the pictures add; of each picture if they have masks; or pairs of a block of the UNet
            ("up.block_0") and its scale, or those of its transformers. Blocks that are not named have 0.
        start: Share of the steps after which it begins to act.
        end: Share of the steps after which it no longer acts.
        mask: Where each picture acts: one mask for all, or one for each; None is everywhere.
    """

    file: Name = Field(description="an IP-Adapter: a file, a folder or a hub id (owner/name[/path])")
    image: Pictures | None = Field(default=None, description=_LIST)
    embeds: Picture | None = Field(
        default=None, description="embeddings of pictures: the path of a file that `mezzotint embed` wrote, or a tensor"
    )
    encoder: Name | None = Field(default=None, description="a CLIP vision encoder: a folder, a file or a hub id")
    scale: Amount | Annotated[tuple[Amount, ...], Field(min_length=1, max_length=MAX_PICTURES)] | BlockScales = Field(
        default=1.0,
        description="a number from -100 to 100, one for each picture, or an object of those of blocks, such as "
        '{"up": {"block_0": [0, 1, 0]}}',
    )
    start: Share = Field(default=0.0, description="a share of the steps from 0 to 1, below end")
    end: Share = Field(default=1.0, description="a share of the steps from 0 to 1, above start")
    mask: Pictures | None = Field(default=None, description=_LIST)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        return given_fields({"file": value} if isinstance(value, str | PathLike) else value)

    @field_validator("image", "mask", mode="before")
    @classmethod
    def _pictures_are_sources(cls, value: Any) -> Any:  # in place of the base's, which is of one picture
        if value is None:
            return None
        return tuple(map(picture_source, value if isinstance(value, list | tuple) else [value]))

    @field_validator("embeds", mode="before")
    @classmethod
    def _tensors_are_files(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]  # as diffusers returns those of one adapter
        if not hasattr(value, "untyped_storage"):
            return fspath(value) if isinstance(value, PathLike) else picture_source(value)
        from safetensors.torch import save  # it brings torch, which is there already

        return save({TENSOR: value.detach().cpu().contiguous()})

    @field_validator("scale", mode="before")
    @classmethod
    def _blocks_are_pairs(cls, value: Any) -> Any:
        if isinstance(value, str) and value[:1] in ("{", "["):  # of a table or the command line
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        return as_tuples(_pairs(value) if isinstance(value, Mapping) else value)

    @field_serializer("image", "mask", when_used="json-unless-none")
    def _to_json(self, value: Any) -> Any:
        return [*map(to_uri, value)]

    @field_serializer("embeds", when_used="json-unless-none")
    def _to_uri(self, value: str | bytes) -> str:
        return to_uri(value)

    @property
    def sources(self) -> dict[str, str | bytes]:
        """Its pictures, masks and embeddings, by the part of a field's name that follows the entry's."""
        lists = {"image": self.image, "mask": self.mask}
        found = {f"{name}[{k}]": each for name, given in lists.items() for k, each in enumerate(given or ())}
        return found | ({} if self.embeds is None else {"embeds": self.embeds})


def _pairs(scales: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Return diffusers' dictionaries {"up": {"block_0": 1}} as pairs ("up.block_0", 1)."""
    found: list[tuple[str, Any]] = []
    for name, value in scales.items():
        inside = isinstance(value, Mapping)
        found += [(f"{name}.{inner}", each) for inner, each in value.items()] if inside else [(str(name), value)]
    return found
