"""Find, describe and read IP-Adapters, the vision encoders that they need, and saved embeddings of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mezzotint.config import UNetConfig
from mezzotint.entries.ip_adapter import TENSOR
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.files import hash_file
from mezzotint.model_options import FAMILIES
from mezzotint.models.ip_adapter import (
    IPAdapterModel,
    LinearProjection,
    PatchProjection,
    Projection,
    Shapes,
    cross_layers,
    image_projection,
)
from mezzotint.weights.control_files import family_of
from mezzotint.weights.files import TensorFile
from mezzotint.weights.hub import network_files, resource, split_id
from mezzotint.weights.keys import Family
from mezzotint.weights.kinds import describe_kind
from mezzotint.weights.model_files import join_names
from mezzotint.weights.safety import PROCESSOR
from mezzotint.weights.save_tensors import write_tensors
from mezzotint.weights.vision_files import KNOWN, NAME, KnownEncoder, VisionFiles, scan_vision

PREFIXES = ("image_proj.", "ip_adapter.")
SUFFIXES = (".safetensors", ".bin", ".pt")
HUB = "h94/IP-Adapter"  # where people get adapters and their encoders
FAMILY_OF_WIDTH: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the tokens


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """An IP-Adapter before its weights are read.

    Attributes:
        file: Its file.
        repository: The hub id of the repository that it is from; None for a path of this machine.
        folder: Its folder in the repository.
    """

    file: TensorFile
    repository: str | None = None
    folder: str = ""

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of its tensors."""
        return {key: shape for key, shape in self.file.shapes.items() if key.startswith(PREFIXES)}

    @cached_property
    def projection(self) -> Projection:
        """Its image projection, without weights. Raises CheckpointError."""
        with torch.device("meta"):
            return image_projection(self.shapes)

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hash_file(self.path)

    def network(self, unet: UNetConfig) -> IPAdapterModel:
        """Build the adapter for a UNet, without weights.

        Raises:
            CheckpointError: If it does not fit the UNet.
        """
        with torch.device("meta"):
            return IPAdapterModel(self.shapes, cross_layers(unet), unet.cross_attention_dim)

    def load(self, unet: UNetConfig, dtype: torch.dtype, device: torch.device) -> IPAdapterModel:
        """Build the adapter for a UNet and read its weights.

        Raises:
            CheckpointError: If the file has changed and no longer fits.
        """
        network = self.network(unet)
        tensors = {key: self.file.read(key).to(device, dtype) for key in network.state_dict()}
        network.load_state_dict(tensors, strict=True, assign=True)
        return network.eval().requires_grad_(False)


def scan_ip_adapter(name: str, unet: UNetConfig | None = None) -> AdapterFiles:
    """Describe an IP-Adapter without reading weights.

    Args:
        name: A file, a folder with one adapter, or a hub id, also with a path inside of the repository.
        unet: The UNet that it has to fit; None is any.

    Raises:
        CheckpointError: If it is missing, damaged, no IP-Adapter, or one for another model.
    """
    path = resource(name, "IP-Adapter", partial(_choose, name))
    if path.is_dir():
        path = path / _choose(str(path), (file.name for file in path.iterdir() if file.is_file()))[0]
    repository, folder = _place_on_hub(name)
    found = AdapterFiles(TensorFile(path), repository, folder)
    if not found.shapes:
        raise CheckpointError(f"{path} is {describe_kind(found.file.shapes)}; it must be an IP-Adapter")
    try:
        width = found.projection.context_dim
        family = FAMILY_OF_WIDTH.get(width)
        if unet is None:
            return found
        if family and width != unet.cross_attention_dim and unet.cross_attention_dim in FAMILY_OF_WIDTH:
            raise CheckpointError(f"it is for {FAMILIES[family]}, and the model is {FAMILIES[family_of(unet)]}")
        if width != unet.cross_attention_dim:
            raise CheckpointError(
                f"its tokens have {width} numbers, and this model's cross-attentions take {unet.cross_attention_dim}"
            )
        wanted = found.network(unet).state_dict()
        if missing := sorted(wanted.keys() - found.shapes.keys()):
            raise CheckpointError(f"it lacks {join_names(missing)}")
        for key, tensor in wanted.items():
            entry = found.file.entries[key]
            if entry.shape != tuple(tensor.shape) or not entry.dtype.is_floating_point:
                raise CheckpointError(f"its {key} must be floating-point, of shape {tuple(tensor.shape)}")
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    return found


def describe_ip_adapter(path: Path, file: TensorFile) -> tuple[str, list[str]]:
    """Describe an IP-Adapter's file in words, and what is wrong with it."""
    found = AdapterFiles(file)
    try:
        projection = found.projection
    except CheckpointError as error:
        return "an IP-Adapter", [f"{path}: {error}"]
    if isinstance(projection, LinearProjection):
        kind = "an IP-Adapter"
    elif isinstance(projection, PatchProjection):
        kind = "an IP-Adapter for whole faces (full face)"
    else:
        kind = "an IP-Adapter Plus face" if "face" in path.name else "an IP-Adapter Plus"
    family = FAMILY_OF_WIDTH.get(projection.context_dim)
    tokens = f"{projection.tokens} tokens" if projection.tokens else "a token for each patch"
    return f"{kind} for {FAMILIES[family] if family else 'a model of another size'}, {tokens}, {_need(found)}", []


def scan_encoder(given: str | None, adapter: AdapterFiles) -> VisionFiles:
    """Describe the vision encoder of an adapter without reading weights.

    Args:
        given: Its folder, file or hub id; None looks for a folder `image_encoder` near the adapter, as they are
            published. For an adapter from the hub it is one of the same repository.
        adapter: The adapter.

    Raises:
        CheckpointError: If it is missing, damaged, or not the encoder that the adapter was trained with.
    """
    known = next((one for one in KNOWN if _fits(one.widths, adapter)), None)
    reasons = []
    for place in [given] if given else _near(adapter, known):
        try:
            path = resource(place, "image encoder", _choose_encoder) if isinstance(place, str) else place
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        if not (path.is_file() or (path / "config.json").is_file()):
            reasons += [f"{str(path)!r} is no encoder's folder or file"] if given else []
            continue
        found = scan_vision(path)
        if found.widths[not adapter.projection.uses_patches] == adapter.projection.input_width:
            return found
        reasons.append(f"that in {path} has hidden states of {found.widths[0]} and an embedding of {found.widths[1]}")
    where = f", which the hub's {HUB} has in {known.folder}" if known and known.folder else ""
    what = f"{known.name}{where}" if known else "the one that it was trained with"
    why = "; ".join(reasons) or f"there is no folder {NAME} beside it"
    raise CheckpointError(
        f"{adapter.path.name} needs its image encoder, {_need(adapter)}: {why}; give {what}, as encoder "
        "(:encoder=FOLDER), or embeds that were computed with it"
    )


def _near(adapter: AdapterFiles, known: KnownEncoder | None) -> list[Path | str]:
    """Return where an adapter's encoder is looked for."""
    if adapter.repository == HUB and known and known.folder:
        return [f"{HUB}/{known.folder}"]
    if adapter.repository:
        return ["/".join(filter(None, (adapter.repository, adapter.folder, NAME)))]
    above = adapter.path.parent
    return [folder / NAME for folder in (above, above.parent, above.parent / "models", above.parent / "sdxl_models")]


def _place_on_hub(name: str) -> tuple[str | None, str]:
    """Return the repository that an adapter's file is from, and its folder there."""
    found = None if Path(name).expanduser().exists() else split_id(name)
    if found is None:
        return None, ""
    folder, _, last = found[1].rpartition("/")
    return found[0], folder if last.endswith(SUFFIXES) else found[1]


def _choose_encoder(listing: Iterable[str]) -> list[str]:
    """Choose the files of an encoder in a folder of a repository. Raises CheckpointError if there are none."""
    names = {*listing}
    files = network_files(names, "", None)
    if not files:
        raise CheckpointError("there is no image encoder: config.json and model.safetensors")
    return [*files, *({PROCESSOR} & names)]


def save_embeds(path: Path, embeds: Tensor) -> Path:
    """Write embeddings of pictures, as `IPAdapter.embeds` reads them. Raises WriteError."""
    return write_tensors(path, {TENSOR: embeds.detach().cpu().contiguous()})


def read_embeds(source: str | bytes, adapter: AdapterFiles) -> Tensor:
    """Read embeddings for an adapter: (2, pictures, ...), of which the first are those of no picture.

    Args:
        source: A path, or the contents of a file.
        adapter: The adapter.

    Raises:
        RequestError: If they are missing, damaged, or another encoder's; the sentence begins with what they are.
    """
    try:
        if isinstance(source, bytes):
            tensors = safetensors.torch.load(source)
        else:
            file = TensorFile(Path(source).expanduser())
            tensors = {key: file.read(key) for key in file.entries if key == TENSOR}
    except (SafetensorError, CheckpointError) as error:
        raise RequestError(f"cannot be read: {error}") from None
    embeds = tensors.get(TENSOR)
    if embeds is None:
        raise RequestError(f"has no tensor {TENSOR}; it must be a file that `mezzotint embed` wrote")
    projection = adapter.projection
    axes = "(2, pictures, patches, {})" if projection.uses_patches else "(2, pictures, {})"
    if embeds.dim() != 3 + projection.uses_patches or embeds.shape[-1] != projection.input_width:
        raise RequestError(
            f"has shape {tuple(embeds.shape)}; for {adapter.path.name} it must be "
            f"{axes.format(projection.input_width)}, {_need(adapter)}"
        )
    if not embeds.is_floating_point() or not embeds.isfinite().all():
        raise RequestError("must be finite floating-point numbers")
    if len(embeds) == 1 and not projection.uses_patches:  # of a run without guidance
        embeds = torch.cat([torch.zeros_like(embeds), embeds])
    if len(embeds) != 2 or not embeds.shape[1]:
        raise RequestError(f"has shape {tuple(embeds.shape)}; its first size must be 2: of no picture, and of pictures")
    return embeds


def _need(adapter: AdapterFiles) -> str:
    """Say what an adapter reads."""
    known = next((one.name for one in KNOWN if _fits(one.widths, adapter)), "a CLIP vision encoder")
    field = "hidden states" if adapter.projection.uses_patches else "embedding"
    return f"{known} ({field} of {adapter.projection.input_width})"


def _fits(widths: tuple[int, int], adapter: AdapterFiles) -> bool:
    """Return whether an encoder of these sizes of hidden states and embedding has what an adapter reads."""
    return widths[not adapter.projection.uses_patches] == adapter.projection.input_width


def _choose(name: str, listing: Iterable[str]) -> list[str]:
    """Return the one adapter among the files of a folder or repository. Raises CheckpointError."""
    there = [file for file in listing if "/" not in file]
    for suffix in SUFFIXES:
        found = sorted(file for file in there if file.endswith(suffix))
        if len(found) == 1:
            return found
        if found:
            raise CheckpointError(f"{name} has {len(found)} files ({join_names(found)}); name one of them")
    raise CheckpointError(
        f"{name} has no .safetensors or .bin file at its top; give the adapter's file, such as "
        f"{HUB}/models/ip-adapter_sd15.safetensors"
    )
