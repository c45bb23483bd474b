"""Read textual inversion files: vectors that a trigger word inserts into a prompt (Gal et al. 2022).

    A1111 .pt                string_to_param.*           (n, width)    its name is the file's
    diffusers .safetensors,  <cat-toy>                   (n, width)    its name is the key (and the file's)
      .bin                                               or (width,)
    kohya .safetensors       emb_params                  (n, width)    its name is the file's
    SDXL                     clip_l and clip_g           (n, width)    its name is the file's; one tensor per encoder
    in a LoRA                bundle_emb.NAME.string_to_param.* (or .clip_l, .clip_g)

Code in a file is never executed; see files.py.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.weights.files import TensorFile
from mezzotint.weights.hub import resource
from mezzotint.weights.listing import list_files
from mezzotint.weights.model_files import join_names

SUFFIXES = (".pt", ".bin", ".safetensors")
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(?:string_to_param\.)?(.+)")
PAIR = ("clip_l", "clip_g")  # SDXL's first and second text encoder


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vectors of a trigger word.

    Attributes:
        path: The file.
        names: Its triggers, without < and >.
        vectors: Shape (n, width), float32, by "clip_l" and "clip_g"; by "" for models with one text encoder.
    """

    path: Path
    names: tuple[str, ...]
    vectors: Mapping[str, Tensor]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vectors."""
        digest = hashlib.sha256()
        for key in sorted(self.vectors):
            digest.update(f"{key}{tuple(self.vectors[key].shape)}".encode())
            digest.update(self.vectors[key].numpy().tobytes())
        return digest.hexdigest()

    def vectors_for(self, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the vectors for text encoders of these widths. Raises CheckpointError if they do not fit."""
        keys = PAIR[: len(widths)] if self.vectors.keys() & {*PAIR} else ("",)
        found = tuple(self.vectors[key] for key in keys if key in self.vectors)
        have = [vectors.shape[1] for vectors in self.vectors.values()]
        if len(have) != len(widths) or [vectors.shape[1] for vectors in found] != [*widths]:
            raise CheckpointError(
                f"{self.path} was made for another model: the vectors of its embedding {self.names[0]!r} have width "
                f"{_and(have)}, and the text encoder's width is {_and(widths)}"
            )
        return found


class Library(Mapping[str, tuple[Tensor, ...]]):
    """Map triggers, in lower case, to the vectors (n, width) for each text encoder.

    An embedding in a folder that was made for another model is an error only if a prompt uses it.
    """

    def __init__(self, sources: Sequence[str], widths: Sequence[int]) -> None:
        """Read embeddings.

        Args:
            sources: Files, folders or hub ids.
            widths: Width of each text encoder.

        Raises:
            CheckpointError: If one is missing or damaged, or a file does not fit the model.
        """
        self._widths = widths
        self._found: dict[str, Embedding] = {}
        for source in sources:
            path = resource(source, "embedding", partial(_choose_files, source))
            alone = path.is_file()
            for embedding in (
                e for file in ([str(path)] if alone else _list_folder(path)) for e in read_embeddings(file)
            ):
                if alone:
                    embedding.vectors_for(widths)
                for name in embedding.names:
                    other = self._found.setdefault(name.lower(), embedding)
                    if other.digest != embedding.digest:
                        raise CheckpointError(
                            f"{other.path} and {embedding.path} both hold an embedding named {name!r}; rename one"
                        )

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        return self._found[name].vectors_for(self._widths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each embedding by its trigger."""
        return {name: embedding.digest for name, embedding in self._found.items()}


def read_embeddings(path: str | Path) -> list[Embedding]:
    """Read the embeddings of a file, or those bundled in a LoRA. Raises CheckpointError if it has none."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return _read(str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=4096)
def _read(name: str, _changed: int, _size: int, _inode: int) -> list[Embedding]:
    path = Path(name)
    file = TensorFile(path)
    bundled: dict[str, dict[str, Tensor]] = {}
    for match in filter(None, map(BUNDLED.fullmatch, file.entries)):
        key = match[2] if match[2] in PAIR else ""
        if key in bundled.setdefault(match[1], {}):
            raise CheckpointError(f"{path}: the bundled embedding {match[1]!r} has several tensors; it must have one")
        bundled[match[1]][key] = _vectors(file, match[0])
    if bundled:
        return [Embedding(path, (name,), vectors) for name, vectors in bundled.items()]
    keys = list(file.entries)
    if {*keys} & {*PAIR}:
        return [Embedding(path, (path.stem,), {key: _vectors(file, key) for key in PAIR if key in file.entries})]
    params = [key for key in keys if key.startswith("string_to_param.")]
    if params or keys == ["emb_params"]:
        if len(params) > 1:
            raise CheckpointError(f"{path} has {len(params)} embeddings in string_to_param; it must have one")
        return [Embedding(path, (path.stem,), {"": _vectors(file, (params or keys)[0])})]
    if not keys or any(
        len(entry.shape) not in (1, 2) or key.endswith(".weight") for key, entry in file.entries.items()
    ):
        raise CheckpointError(
            f"{path} is not a textual inversion: it must have string_to_param, emb_params, clip_l and clip_g, "
            f"bundle_emb, or a tensor named by its trigger; it has {join_names(keys) or 'no tensors'}"
        )
    single = (path.stem,) if len(keys) == 1 else ()
    return [Embedding(path, (key.strip("<>"), *single), {"": _vectors(file, key)}) for key in keys]


def _vectors(file: TensorFile, key: str) -> Tensor:
    tensor = file.read(key).float()
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or not tensor.numel() or not tensor.isfinite().all():
        raise CheckpointError(
            f"{file.path}: {key!r} of shape {tuple(tensor.shape)} is not an embedding; it must be finite and of shape "
            "(vectors, width)"
        )
    return tensor


def _choose_files(name: str, listing: Iterable[str]) -> list[str]:
    """Choose the embeddings among a repository's files."""
    files = _safest_formats(file for file in listing if "/" not in file)
    if not files:
        raise CheckpointError(
            f"The hub's {name} is not an embedding: it has no .safetensors, .bin or .pt file in its root"
        )
    return files


def _list_folder(path: Path) -> list[str]:
    """Return the embedding files of a folder."""
    files = _safest_formats(list_files(path, SUFFIXES))
    if not files:
        raise CheckpointError(f"{path} is a folder without .safetensors, .bin or .pt files, so it has no embeddings")
    place = str(path)
    return [f"{place}/{file}" for file in files]


def _safest_formats(names: Iterable[str]) -> list[str]:
    """Return the files that may be embeddings, each in its safest format."""
    listing, best = list(names), dict[str, str]()
    for suffix in SUFFIXES:  # the safest last
        best |= {name.removesuffix(suffix): name for name in listing if name.endswith(suffix)}
    return sorted(best.values())


def _and(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
