"""Read textual inversion files: vectors that a trigger word inserts into a prompt (Gal et al. 2022).

    A1111 .pt                string_to_param.*           (n, width)    its name is the file's
    diffusers .safetensors,  <cat-toy>                   (n, width)    its name is the key (and the file's)
      .bin                                               or (width,)
    kohya .safetensors       emb_params                  (n, width)    its name is the file's
    SDXL                     clip_l and clip_g, or       (n, width)    its name is the file's; one tensor per encoder
                             text_encoders_0 and _1
    SDXL, diffusers          <cat-toy> in two files      (n, width)    one file per encoder, as their widths show:
                                                                       learned_embeds and learned_embeds_2, for instance
    A1111 .png               see embedding_images.py     (n, width)    its name is in it
    in a LoRA                bundle_emb.NAME.string_to_param.* (or .clip_l, .clip_g)

Code in a file is never executed; see files.py.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.weights.embedding_images import read_embedding_image
from mezzotint.weights.files import TensorFile
from mezzotint.weights.hub import resource
from mezzotint.weights.listing import list_files
from mezzotint.weights.model_files import dtype_name, join_names

SUFFIXES = (".pt", ".bin", ".safetensors")
IMAGE = ".png"
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(?:string_to_param\.)?(.+)")
PAIR = ("clip_l", "clip_g")  # SDXL's first and second text encoder
ALIASES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
MAX_VECTORS, MAX_WIDTH = 4096, 16384  # of an embedding; a window of text has at most 75

# other files in the folder of a training run, which may look like embeddings or be unreadable; and pictures
RUN_FOLDERS = re.compile(r"cache|logs|checkpoint-\d+")
RUN_FILES = re.compile(
    r"(optimizer|scheduler|scaler|random_states|state|training_args)([_-]\d+)*\.\w+|.*\.preview\.png"
)

Problem = tuple[type[CheckpointError], str]


class _OtherFileError(CheckpointError):
    """A file that is readable and holds something else."""


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
        left = [self.vectors[key] for key in sorted(self.vectors, key=["", *PAIR].index)]
        if [*widths] == [vectors.shape[1] for vectors in left[1:]]:  # SDXL's refiner has the second encoder alone
            left = left[1:]
        have = [vectors.shape[1] for vectors in left]
        if sorted(have) != sorted(widths):
            raise CheckpointError(
                f"{self.path} was made for another model: the vectors of its embedding {self.names[0]!r} have width "
                f"{_and(have)}, and the text encoder's width is {_and(widths)}"
            )
        return tuple(left.pop([vectors.shape[1] for vectors in left].index(width)) for width in widths)

    def paired(self, other: Embedding, widths: Sequence[int]) -> Embedding | None:
        """Return this embedding and that of the other text encoder as one, or None if they are not a pair."""
        both = [*self.vectors.values(), *other.vectors.values()]
        if len(widths) != 2 or len(both) != 2 or sorted(v.shape[1] for v in both) != sorted(widths):
            return None
        first, second = both if both[0].shape[1] == widths[0] else both[::-1]
        names = tuple(dict.fromkeys((*self.names, *other.names)))
        return Embedding(self.path, names, dict(zip(PAIR, (first, second), strict=True)))


class Library(Mapping[str, tuple[Tensor, ...]]):
    """Map triggers, in lower case, to the vectors (n, width) for each text encoder.

    A file in a folder that is damaged or was made for another model is an error only if a prompt uses it.
    """

    def __init__(self, sources: Sequence[str], widths: Sequence[int]) -> None:
        """Read embeddings.

        Args:
            sources: Files, folders or hub ids.
            widths: Width of each text encoder.

        Raises:
            CheckpointError: If a file or folder is missing, or a file that is named itself is damaged or does not fit.
        """
        self._widths = widths
        self._found: dict[str, Embedding] = {}
        self._damaged: dict[str, str] = {}  # trigger -> what is wrong with its file
        named: list[str] = []
        for source in sources:
            path = resource(source, "embedding", partial(_choose_files, source))
            alone = path.is_file()
            for file in [str(path)] if alone else _list_folder(path):
                found, problem = _cached(file)
                if problem and alone:
                    raise CheckpointError(problem[1])
                if problem and problem[0] is not _OtherFileError:
                    self._damaged.setdefault(Path(file).stem.lower(), problem[1])
                for embedding in found:
                    self._add(embedding)
                    named += embedding.names[:1] if alone else ()
        for name in named:
            self[name.lower()]
        self._damaged = {name: problem for name, problem in self._damaged.items() if name not in self._found}

    def _add(self, embedding: Embedding) -> None:
        """Add an embedding under its triggers, or the pair of it and that of the other text encoder."""
        for name in embedding.names:
            other = self._found.get(name.lower(), embedding)
            if other.digest == embedding.digest:
                self._found[name.lower()] = other
            elif pair := other.paired(embedding, self._widths):
                self._found |= {trigger.lower(): pair for trigger in pair.names}
                return
            else:
                raise CheckpointError(
                    f"{other.path} and {embedding.path} both hold an embedding named {name!r}; rename one"
                )

    def for_widths(self, widths: Sequence[int]) -> Library:
        """Return the same embeddings for text encoders of other widths."""
        other = copy(self)
        other._widths = widths
        return other

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        if name in self._damaged:
            raise CheckpointError(self._damaged[name])
        return self._found[name].vectors_for(self._widths)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._found, **self._damaged})

    def __len__(self) -> int:
        return len(self._found) + len(self._damaged)

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each embedding by its trigger."""
        return {name: embedding.digest for name, embedding in self._found.items()}


def read_embeddings(path: str | Path) -> list[Embedding]:
    """Read the embeddings of a file, or those bundled in a LoRA. Raises CheckpointError if it has none."""
    found, problem = _cached(str(path))
    if problem:
        raise CheckpointError(problem[1])
    return found


def _cached(path: str) -> tuple[list[Embedding], Problem | None]:
    """Return what `_read` returned for the file as it is now."""
    try:
        stat = os.stat(path)
    except OSError as error:
        return [], (CheckpointError, f"{path} cannot be read: {error.strerror}")
    return _read(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=4096)
def _read(name: str, _changed: int, _size: int, _inode: int) -> tuple[list[Embedding], Problem | None]:
    """Return the embeddings of a file, and what is wrong with it: the class and the sentence of the error."""
    try:
        return _read_image(Path(name)) if name.endswith(IMAGE) else _read_tensors(Path(name)), None
    except CheckpointError as error:
        return [], (type(error), str(error))


def _read_image(path: Path) -> list[Embedding]:
    found = read_embedding_image(path)
    if found is None:
        raise _OtherFileError(f"{path} is a picture without an embedding in it")
    name, vectors = found
    _check_shape(path, name, tuple(vectors.shape))
    return [Embedding(path, (name,), {"": _check_finite(path, name, vectors)})]


def _read_tensors(path: Path) -> list[Embedding]:
    file = TensorFile(path)
    bundled: dict[str, dict[str, Tensor]] = {}
    for match in filter(None, map(BUNDLED.fullmatch, file.entries)):
        key = _encoder(match[2])
        if key in bundled.setdefault(match[1], {}):
            raise CheckpointError(f"{path}: the bundled embedding {match[1]!r} has several tensors; it must have one")
        bundled[match[1]][key] = _vectors(file, match[0])
    if bundled:
        return [Embedding(path, (name,), vectors) for name, vectors in bundled.items()]
    keys = list(file.entries)
    if pair := {_encoder(key): key for key in keys if _encoder(key)}:
        return [Embedding(path, (path.stem,), {encoder: _vectors(file, pair[encoder]) for encoder in pair})]
    params = [key for key in keys if key.startswith("string_to_param.")]
    if params or keys == ["emb_params"]:
        if len(params) > 1:
            raise CheckpointError(f"{path} has {len(params)} embeddings in string_to_param; it must have one")
        return [Embedding(path, (path.stem,), {"": _vectors(file, (params or keys)[0])})]
    if not keys or any(
        len(entry.shape) not in (1, 2) or key.endswith(".weight") for key, entry in file.entries.items()
    ):
        raise _OtherFileError(
            f"{path} is not a textual inversion: it must have string_to_param, emb_params, clip_l and clip_g, "
            f"bundle_emb, or a tensor named by its trigger; it has {join_names(keys) or 'no tensors'}"
        )
    single = (path.stem,) if len(keys) == 1 else ()
    return [Embedding(path, (key.strip("<>"), *single), {"": _vectors(file, key)}) for key in keys]


def _encoder(key: str) -> str:
    """Return "clip_l" or "clip_g" for the key of one encoder's vectors, and "" for other keys."""
    key = ALIASES.get(key, key)
    return key if key in PAIR else ""


def _vectors(file: TensorFile, key: str) -> Tensor:
    shape, dtype = file.entries[key].shape, file.entries[key].dtype
    _check_shape(file.path, key, shape if len(shape) > 1 else (1, *shape))
    if not dtype.is_floating_point:
        raise CheckpointError(f"{file.path}: {key!r} is {dtype_name(dtype)}; an embedding must be floating-point")
    return _check_finite(file.path, key, file.read(key).float().view(-1, shape[-1]))


def _check_shape(path: Path, key: str, shape: tuple[int, ...]) -> None:
    """Check the shape of an embedding before it is read. Raises CheckpointError."""
    if len(shape) != 2 or not 0 < shape[0] <= MAX_VECTORS or not 0 < shape[1] <= MAX_WIDTH:
        raise CheckpointError(
            f"{path}: {key!r} of shape {shape} is not an embedding; it must be of shape (vectors, width), at most "
            f"({MAX_VECTORS}, {MAX_WIDTH})"
        )


def _check_finite(path: Path, key: str, vectors: Tensor) -> Tensor:
    if not vectors.isfinite().all():
        raise CheckpointError(f"{path}: {key!r} is not an embedding; its values must be finite")
    return vectors.contiguous()


def _choose_files(name: str, listing: Iterable[str]) -> list[str]:
    """Choose the embeddings among a repository's files."""
    files = _safest_formats(file for file in listing if "/" not in file and not file.endswith(IMAGE))
    if not files:
        raise CheckpointError(
            f"The hub's {name} is not an embedding: it has no .safetensors, .bin or .pt file in its root"
        )
    return files


def _list_folder(path: Path) -> list[str]:
    """Return the files of a folder that may be embeddings."""
    files = _safest_formats(filter(_may_be_embedding, list_files(path, (*SUFFIXES, IMAGE))))
    if not files:
        raise CheckpointError(f"{path} is a folder without .safetensors, .bin or .pt files, so it has no embeddings")
    place = str(path)
    return [f"{place}/{file}" for file in files]


def _may_be_embedding(name: str) -> bool:
    """Return whether a file, by its path in the folder, is no other file of a training run and no preview."""
    *folders, file = name.split("/")
    return not RUN_FILES.fullmatch(file) and not any(map(RUN_FOLDERS.fullmatch, folders))


def _safest_formats(names: Iterable[str]) -> list[str]:
    """Return the files that may be embeddings, each in its safest format."""
    listing, best = list(names), dict[str, str]()
    for suffix in (IMAGE, *SUFFIXES):  # the safest last
        best |= {name.removesuffix(suffix): name for name in listing if name.endswith(suffix)}
    return sorted(best.values())


def _and(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
