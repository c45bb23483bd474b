"""Pictures as prompts: open them, encode them, and make of them what the UNet attends to through IP-Adapters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.config import UNetConfig
from mezzotint.devices import best_device, device_of, dtype_on
from mezzotint.entries.fields import picture_source
from mezzotint.entries.ip_adapter import IPAdapter
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.images.init_image import Source, digest, digests, fit, open_mask, open_picture, read
from mezzotint.models.clip_vision import CLIPVisionModel, preprocess
from mezzotint.models.ip_adapter import ImagePrompt, cross_layers
from mezzotint.models.offload import onload
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.run.kept import Descriptions, LastRun
from mezzotint.run.safety import checker_placement
from mezzotint.weights.ip_adapter_files import AdapterFiles, read_embeds, scan_encoder, scan_ip_adapter
from mezzotint.weights.vision_files import VisionFiles

if TYPE_CHECKING:
    from mezzotint.run.plan import RunPlan

OTHER_SHAPE = 0.02  # of a side: less is the rounding to multiples of 8
F = TypeVar("F", AdapterFiles, VisionFiles)
Layers = list[tuple[Tensor, Tensor]]  # keys and values of each cross-attention


@dataclass(frozen=True, eq=False)
class AdapterInput:
    """An IP-Adapter of a planned run.

    Attributes:
        entry: The request's entry.
        field: Its field, for error messages.
        files: The adapter.
        digest: SHA-256 of its file.
        scales: Its scale in every cross-attention: a number, or one for each picture.
        encoder: What its pictures are encoded with; None if embeddings are given.
        encoder_digest: SHA-256 of the encoder's weights.
    """

    entry: IPAdapter
    field: str
    files: AdapterFiles
    digest: str
    scales: Sequence[float | tuple[float, ...]]
    encoder: VisionFiles | None
    encoder_digest: str = ""


class ImagePrompts:
    """The IP-Adapters of one model. What they make of pictures is kept until a run with others; threads may share it.

    Weights of adapters and of encoders are in memory only while pictures are encoded.
    """

    def __init__(self, unet: UNetConfig, device: torch.device, dtype: torch.dtype, placement: Placement) -> None:
        """Refer to a model.

        Args:
            unet: The configuration of its UNet.
            device: Where it computes.
            dtype: What it computes in.
            placement: Its placement.
        """
        self._unet, self._device, self._dtype, self._placement = unet, device, dtype, placement
        self._adapters = Descriptions[tuple[AdapterFiles, str]](lambda found: [found[0].path])
        self._encoders = Descriptions[tuple[VisionFiles, str]](lambda found: found[0].paths)
        self._kept = LastRun[tuple[Layers, Layers]]()

    def read(self, entries: Sequence[IPAdapter]) -> tuple[AdapterInput, ...]:
        """Describe the files of a request's entries.

        Raises:
            CheckpointError: If one is missing, damaged, or for another model; the sentence names the entry.
        """
        found = []
        for k, entry in enumerate(entries):
            field = f"ip_adapter[{k}]"
            encoder: tuple[VisionFiles | None, str] = None, ""
            try:
                files, digest = self._adapters.get(
                    entry.file, partial(_with_digest, scan_ip_adapter, entry.file, self._unet)
                )
            except CheckpointError as error:
                raise CheckpointError(f"{field}.file: {error}") from None
            try:
                if entry.embeds is None:
                    describe = partial(_with_digest, scan_encoder, entry.encoder, files)
                    encoder = self._encoders.get((entry.encoder, files.path), describe)
            except CheckpointError as error:
                raise CheckpointError(f"{field}.encoder: {error}") from None
            scales = layer_scales(self._unet, entry.scale, field)
            found.append(AdapterInput(entry, field, files, digest, scales, *encoder))
        return tuple(found)

    def prepare(self, plan: RunPlan) -> list[ImagePrompt]:
        """Return the picture prompts of one pass.

        Raises:
            RequestError: If a picture, a mask or embeddings cannot be used.
        """
        keys = [self._key(one) for one in plan.ip_adapters]
        made = {key: partial(self._encode, one) for key, one in zip(keys, plan.ip_adapters, strict=True)}
        layers = self._kept.get(made)
        return [
            prompt
            for key, one in zip(keys, plan.ip_adapters, strict=True)
            for prompt in _prompts(plan, one, *layers[key])
        ]

    def _key(self, one: AdapterInput) -> Hashable:
        """Return what the keys and values of an entry's pictures depend on."""
        sources = one.entry.image if one.entry.embeds is None else (one.entry.embeds,)
        contents = tuple(digest(read(source, one.field)) for source in sources or ())
        return one.digest, one.encoder_digest, contents

    def _encode(self, one: AdapterInput) -> tuple[Layers, Layers]:
        """Return the keys and values of an entry's pictures and of no picture, each (pictures, heads, T, d)."""
        if one.encoder is None:
            assert one.entry.embeds is not None
            embeds = _read_embeds(one)
        else:
            opened = [open_picture(p, f"{one.field}.image[{k}]") for k, p in enumerate(one.entry.image or ())]
            embeds = encode_pictures(one.files, one.encoder, opened, self._device, self._dtype, self._placement)
        network = one.files.load(self._unet, self._dtype, self._device)
        negative, positive = (
            network.keys_values(network.image_proj(each.to(self._device, self._dtype))) for each in embeds
        )
        return positive, negative


def _with_digest(scan: Callable[..., F], *args: Any) -> tuple[F, str]:
    """Return what a function describes, and the SHA-256 of its weights."""
    files = scan(*args)
    return files, files.digest


def encode_pictures(
    adapter: AdapterFiles,
    encoder: VisionFiles,
    pictures: Sequence[Image.Image],
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = Placement(),  # noqa: B008  # frozen
) -> Tensor:
    """Return what an encoder makes of no picture and of pictures, as an adapter reads it, (2, pictures, ...).

    Args:
        adapter: The adapter.
        encoder: Its encoder, whose weights are forgotten afterwards.
        pictures: RGB pictures.
        device: Where the encoder computes.
        dtype: What it computes in.
        placement: The placement of the model.
    """
    network = cast(CLIPVisionModel, encoder.network.network())
    encoder.network.load(network, dtype, device, checker_placement(encoder, device, placement))
    with torch.inference_mode(), onload(network.requires_grad_(False)):
        pixels = preprocess(encoder.processor, pictures).to(device)
        output = network(pixels)
        if adapter.projection.uses_patches:
            found = output.hidden_states[-2]
            none = network(torch.zeros_like(pixels[:1])).hidden_states[-2].expand_as(found)
        else:
            found = cast(Tensor, output.embeds)  # an encoder is read with its projection
            none = torch.zeros_like(found)
    return torch.stack([none, found])


def embed_images(
    file: str | Path,
    images: Any,
    *,
    encoder: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Tensor:
    """Return the embeddings of pictures for an IP-Adapter, to give as `embeds` of entries of `Request.ip_adapter`.

    They are what diffusers' `prepare_ip_adapter_image_embeds` returns with guidance, (2, pictures, ...): first those of
    no picture. They depend on the encoder and the kind of the adapter, not on the model.

    Args:
        file: The adapter: a file, a folder or a hub id.
        images: A picture or a list of pictures: paths of files, their bytes, or PIL images.
        encoder: The folder or file of the vision encoder; None looks near the adapter.
        device: Where to compute; by default as `mezzotint.load`.
        dtype: What to compute in.

    Raises:
        CheckpointError: If the adapter or its encoder is missing or damaged.
        RequestError: If a picture cannot be opened.
    """
    adapter = scan_ip_adapter(str(file))
    found = scan_encoder(None if encoder is None else str(encoder), adapter)
    sources = [picture_source(each) for each in (images if isinstance(images, list | tuple) else [images])]
    if not sources:
        raise RequestError("images is empty; it must be a picture or a list of pictures")
    opened = [open_picture(source, f"images[{k}]") for k, source in enumerate(sources)]
    place = device_of(device or best_device())
    return encode_pictures(adapter, found, opened, place, dtype_on(place, dtype))


def check_ip_adapters(request: Request) -> None:
    """Check the entries of a request: pictures or embeddings, as many masks and scales as pictures, a picture's shape.

    Raises:
        RequestError: If something does not fit.
    """
    for k, entry in enumerate(request.ip_adapter or ()):
        field = f"ip_adapter[{k}]"
        if (entry.image is None) == (entry.embeds is None):
            state = "both given" if entry.image else "both missing"
            raise RequestError(f"{field}.image and {field}.embeds are {state}; give pictures, or embeds of them")
        if entry.mask and request.tile:
            raise RequestError(f"{field}.mask and tile are given; a mask is one of the whole picture")
        if entry.image is not None:
            _check_counts(entry, field, len(entry.image))


def _check_counts(entry: IPAdapter, field: str, pictures: int) -> None:
    """Check that the masks and the scales of an entry are as many as its pictures. Raises RequestError."""
    if len(entry.mask or ()) not in (0, 1, pictures):
        raise RequestError(
            f"{field}.mask has {len(entry.mask or ())} masks for {pictures} pictures; give one, or one each"
        )
    for scale in _lists(entry.scale):
        if len(scale) != pictures or not entry.mask:
            why = f"there are {pictures} pictures" if entry.mask else "they have no mask"
            raise RequestError(f"{field}.scale has {len(scale)} numbers, one for each picture, and {why}")


def _lists(scale: Any) -> list[tuple[float, ...]]:
    """Return the scales that have a number for each picture."""
    if not isinstance(scale, tuple):
        return []
    if not isinstance(scale[0], tuple):
        return [scale]
    leaves = (leaf for _, value in scale if isinstance(value, tuple) for leaf in value)
    return [leaf for leaf in leaves if isinstance(leaf, tuple)]


def layer_scales(unet: UNetConfig, scale: Any, field: str) -> list[float | tuple[float, ...]]:
    """Return the scale in every cross-attention, in module order: a number, or one for each picture.

    Scales by block are those of diffusers' `set_ip_adapter_scale`: what is not named has 0.

    Args:
        unet: The configuration of the UNet.
        scale: The entry's scale.
        field: The entry's field, for error messages.

    Raises:
        RequestError: If a block is named that has no cross-attention, or as many numbers as it has no transformers.
    """
    layers = cross_layers(unet)
    if not (isinstance(scale, tuple) and isinstance(scale[0], tuple)):
        return [scale] * len(layers)
    blocks: dict[str, int] = {}  # transformers of each
    for layer in layers:
        block, transformer = _place(layer.name)
        blocks[block] = max(blocks.get(block, 0), transformer + 1)
    found: dict[tuple[str, int], Any] = {}
    for name, value in scale:
        named = [block for block in blocks if block == name or block.startswith(f"{name}.")]
        if not named:
            raise RequestError(
                f"{field}.scale names {name}; the cross-attentions of this model are in {', '.join(blocks)}"
            )
        for block in named:
            values = value if isinstance(value, tuple) else (value,)
            if len(values) not in (1, blocks[block]):
                raise RequestError(
                    f"{field}.scale has {len(values)} numbers for {block}; it has {blocks[block]} transformers"
                )
            for k in range(blocks[block]):
                if found.get((block, k)) is None or name == block:
                    found[block, k] = values[k % len(values)]
    return [found.get(_place(layer.name), 0.0) for layer in layers]


def _place(layer: str) -> tuple[str, int]:
    """Return the block and the transformer of "up_blocks.0.attentions.1...": ("up.block_0", 1)."""
    parts = layer.split(".")
    if parts[0] == "mid_block":
        return "mid", int(parts[2])
    return f"{parts[0].removesuffix('_blocks')}.block_{parts[1]}", int(parts[3])


def ip_adapter_digests(plan: RunPlan) -> dict[str, dict[str, str | None]]:
    """Return the path (None if bytes were given) and SHA-256 of pictures, masks and embeddings, by field."""
    return digests({f"{one.field}.{name}": s for one in plan.ip_adapters for name, s in one.entry.sources.items()})


def _prompts(plan: RunPlan, one: AdapterInput, positive: Layers, negative: Layers) -> list[ImagePrompt]:
    """Return the prompts of one entry: one of all pictures after one another, or one for each mask."""
    entry, pictures = one.entry, len(positive[0][0])
    _check_counts(entry, one.field, pictures)
    if not entry.mask:
        scales = cast(Sequence[float], one.scales)  # which are of each picture only where there are masks
        return [ImagePrompt(_joined(positive), _joined(negative), scales, None, entry.start, entry.end)]
    masks = [_read_mask(plan, source, f"{one.field}.mask[{k}]") for k, source in enumerate(entry.mask)]
    return [
        ImagePrompt(
            _part(positive, k),
            _part(negative, k),
            [scale[k] if isinstance(scale, tuple) else scale for scale in one.scales],
            masks[k % len(masks)],
            entry.start,
            entry.end,
        )
        for k in range(pictures)
    ]


def _joined(layers: Layers) -> Layers:
    """Return keys and values (pictures, heads, T, d) as those of one long picture, (1, heads, pictures * T, d)."""
    return [(k.transpose(0, 1).flatten(1, 2)[None], v.transpose(0, 1).flatten(1, 2)[None]) for k, v in layers]


def _part(layers: Layers, picture: int) -> Layers:
    """Return the keys and values of one picture."""
    return [(k[picture : picture + 1], v[picture : picture + 1]) for k, v in layers]


def _read_mask(plan: RunPlan, source: Source, field: str) -> Tensor:
    """Return a mask as (1, 1, height, width), 0 or 1, as diffusers' IPAdapterMaskProcessor prepares it.

    Raises:
        RequestError: If it cannot be opened, or has another shape than the picture.
    """
    mask, start = open_mask(source, field), plan.init_image
    size = plan.request.width or 0, plan.request.height or 0
    crops = start is not None and start.box is not None and start.canvas is not None
    whole = start.canvas.size if crops else size  # type: ignore[union-attr]
    if abs(mask.width * whole[1] - mask.height * whole[0]) > OTHER_SHAPE * mask.height * whole[0]:
        raise RequestError(
            f"{field} is {mask.width}x{mask.height}; it must have the shape of the picture, {whole[0]}x{whole[1]}, at "
            "any size"
        )
    if crops:
        mask = fit(mask, whole).crop(start.box)  # type: ignore[union-attr]
    pixels = np.asarray(mask.resize(size, Image.Resampling.LANCZOS), np.float32) / 255.0
    return torch.from_numpy((pixels >= 0.5).astype(np.float32))[None, None]


def _read_embeds(one: AdapterInput) -> Tensor:
    assert one.entry.embeds is not None
    try:
        return read_embeds(one.entry.embeds, one.files)
    except RequestError as error:
        given = repr(one.entry.embeds[:200]) if isinstance(one.entry.embeds, str) else "a tensor"
        raise RequestError(f"{one.field}.embeds ({given}) {error}") from None
