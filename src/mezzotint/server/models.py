"""The names of models and files that a request may use, and the models that are loaded now.

A request never names a path. Its names are looked up in listings of the folders that the server was started with.
"""

from __future__ import annotations

import copy
import gc
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.errors import BudgetError, CheckpointError, MezzotintError
from mezzotint.memory import system
from mezzotint.server.errors import InvalidError
from mezzotint.server.settings import Settings
from mezzotint.weights.hub import BUNDLED
from mezzotint.weights.listing import list_files

if TYPE_CHECKING:
    from mezzotint.memory.planner import MemoryPlan
    from mezzotint.pipeline import Pipeline
    from mezzotint.request import Request
    from mezzotint.run.preview import LatentPreview, TinyPreview

log = logging.getLogger("mezzotint.server")
SUFFIXES = {
    "vaes": (".safetensors", ".pt", ".ckpt"),
    "loras": (".safetensors", ".pt", ".bin"),
    "embeddings": (".safetensors", ".pt", ".bin", ".png", ".webp"),
    "controls": (".safetensors", ".pth", ".pt", ".bin", ".ckpt"),
    **dict.fromkeys(("ip_adapters", "encoders", "image_embeds"), (".safetensors", ".bin", ".pt")),
    "wildcards": (".txt",),
}
DIFFUSERS = "diffusion_pytorch_model"  # how the weights in a folder of diffusers are called
MAX_FILES = 10_000


@dataclass
class LoadedModel:
    """A model in memory."""

    pipe: Pipeline
    preview: LatentPreview | TinyPreview | None = None


class Models:
    """Lists names, and keeps models loaded; the least recently used one is unloaded when memory is short.

    Args:
        settings: The settings of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: dict[tuple[str, str | None], LoadedModel] = {}  # the last one was used last
        self._lock = threading.Lock()
        self._all = [self._loaded]  # those of the other devices too
        self.device = settings.devices[0] if settings.devices else None  # None is the best one
        self.paths = _name_models(settings.models)

    def on(self, device: str) -> Models:
        """Return the same names, with loaded models of their own on another device."""
        found = copy.copy(self)
        found.device, found._loaded = device, {}
        self._all.append(found._loaded)
        return found

    # ---- names -------------------------------------------------------------------------------------------------------

    @property
    def default(self) -> str:
        """The name of the model that a request without one gets."""
        return next(iter(self.paths))

    def names(self, kind: str) -> dict[str, Path]:
        """Return the files of a kind, a key of SUFFIXES, by name.

        A name is the file's path below its folder without the suffix, with / between folders. Where two files differ
        in the suffix alone, the first by name has it. A ControlNet's folder of diffusers has the folder's name, and so
        has an image encoder's. IP-Adapters, encoders and embeddings of pictures are in one folder.
        """
        of_adapters = kind in ("ip_adapters", "encoders", "image_embeds")
        folder = self._settings.folders().get("ip_adapters" if of_adapters else kind)
        if folder is None:
            return {}
        files = sorted(list_files(folder, SUFFIXES[kind]))[:MAX_FILES]
        found: dict[str, Path] = {}
        for file in reversed(files):
            place, _, last = file.rpartition("/")
            if of_adapters:
                known, path = _kind_near_adapters(folder / file)
                if known == kind:
                    found[path.relative_to(folder).as_posix().removesuffix(path.suffix)] = path
            elif kind == "controls" and place and last.startswith(DIFFUSERS):
                found[place] = folder / place
            else:
                found[file.rpartition(".")[0]] = folder / file
        return found

    def find(self, kind: str, name: str, param: str) -> str:
        """Return the path of a listed file.

        Args:
            kind: As in `names`.
            name: A name of the listing, with or without the suffix, in any case.
            param: The field of the request, for the error.

        Raises:
            InvalidError: If no file has the name.
        """
        listing = self.names(kind)
        for known, path in listing.items():
            if name.lower() in (known.lower(), f"{known}{path.suffix}".lower(), path.stem.lower()):
                return str(path)
        raise InvalidError(f"{param} names {name[:100]!r}, which the server does not list", param)

    def embeddings_in(self, text: str) -> list[str]:
        """Return the names of the listed textual inversions that occur as words in a text."""
        found, lower = [], text.lower()
        for name in self.names("embeddings"):
            word = name.rpartition("/")[2].lower()
            if word in lower and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", lower):
                found.append(name)
        return found

    def find_model(self, name: str, param: str = "model") -> str:
        """Return the listed name of a model, in any case.

        Args:
            name: The name.
            param: The field of the request, for the error.

        Raises:
            InvalidError: If it is not listed.
        """
        found = next((known for known in self.paths if known.lower() == name.lower()), None)
        if found is None:
            raise InvalidError(
                f"{param} is {name[:100]!r}, which the server does not list; it has {', '.join(self.paths)}", param
            )
        return found

    def find_source(self, name: str, param: str) -> str:
        """Return what a listed model is loaded from, with the arguments of `find_model`."""
        return self.paths[self.find_model(name, param)] or BUNDLED.name

    def describe(self) -> list[dict[str, Any]]:
        """Describe the models: their names, which is the default, which are loaded, and their own settings."""
        with self._lock:
            loaded = {name for each in self._all for name, _ in each}
        return [
            {"name": name, "default": name == self.default, "loaded": name in loaded, "settings": self._own(name)}
            for name in self.paths
        ]

    def _own(self, name: str) -> dict[str, Any] | None:
        """Return what a model draws with where a request says nothing, or None where its files are not here."""
        path = self.paths[name]
        if path is not None and not Path(path).exists():
            return None
        try:
            return _own_settings(path, self.device, self._settings.dtype)
        except MezzotintError:
            return None

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load(self, model: str, vae: str | None, request: Request) -> LoadedModel:
        """Return a loaded model, after letting others go if there is no room for it.

        Raises:
            CheckpointError: If its files are missing or damaged.
            BudgetError: If the request does not fit into the memory even alone.
        """
        key = model, vae
        with self._lock:
            found = self._loaded.pop(key, None)
            if found is not None:
                self._loaded[key] = found  # now the most recently used
        if found is not None and self._fits(found.pipe, request):
            return found
        if found is not None:
            self.unload(key)
        found = self._load(key, request)
        with self._lock:
            self._loaded[key] = found
        return found

    def unload(self, key: tuple[str, str | None] | None = None) -> None:
        """Unload a model, or all of them."""
        with self._lock:
            for each in [key] if key else list(self._loaded):
                self._loaded.pop(each, None)
        gc.collect()
        system.trim_heap()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, key: tuple[str, str | None], request: Request) -> LoadedModel:
        import torch

        import mezzotint

        options = self._options(key[1])
        memory: MemoryPlan | None = None
        while True:
            try:
                memory = self._plan(key, request, self._settings.memory or "auto", options)
                crowded = bool(memory.costs)
            except BudgetError:
                if not self._loaded and self._settings.memory:
                    raise
                crowded = True
            if not crowded or not self._loaded:
                break
            with self._lock:
                oldest = next(iter(self._loaded))
            self.unload(oldest)
        place: dict[str, Any] = {"memory": memory} if self._settings.memory else {}
        if self.device is not None and self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)  # of this thread, for kernels that are not told their device
        dtype = self._settings.dtype
        torch.set_num_threads(system.default_threads(torch.get_num_threads()))
        pipe = mezzotint.load(self.paths[key[0]], device=self.device, dtype=dtype, **place, **options)
        return LoadedModel(pipe, self._preview(pipe, key[0]))

    def _preview(self, pipe: Pipeline, model: str) -> LatentPreview | TinyPreview | None:
        """Return what shows a model's latents, the TAESD that is given for it or a matrix; None without previews."""
        if not self._settings.preview_every:
            return None
        given = dict(zip(self.paths, self._settings.preview_vaes, strict=False)).get(model)
        if given is not None:
            try:
                return pipe.preview(given)
            except CheckpointError as error:
                log.warning("previews of %s are shown without its TAESD: %s", model, error)
        return pipe.preview()

    def _fits(self, pipe: Pipeline, request: Request) -> bool:
        """Return whether a request fits the budget that a pipeline was loaded with."""
        spare = pipe.spare_memory(pipe.plan(request)) if self._settings.memory else None
        return spare is None or spare >= 0

    def _options(self, vae: str | None) -> dict[str, Any]:
        return {"vae": self.find("vaes", vae, "vae")} if vae is not None else {}

    # ---- planning ----------------------------------------------------------------------------------------------------

    def own_size(self, model: str) -> tuple[int, int]:
        """Return the width and height that a model draws when none is given; its files' headers are read once."""
        info = _headers(self.paths[model], self.device, self._settings.dtype, ()).info
        return info.settings.get("width", info.native_size), info.settings.get("height", info.native_size)

    def check_controls(self, model: str, request: Request) -> None:
        """Check that the ControlNets and IP-Adapters of a request are for a model, by the headers of their files.

        Raises:
            CheckpointError: If one is not, or is damaged.
            RequestError: If one lacks its picture.
        """
        from mezzotint.run.controls import check_controls
        from mezzotint.run.image_prompts import check_ip_adapters

        check_controls(request)
        check_ip_adapters(request)
        path = self.paths[model]
        if path is not None and not Path(path).exists():
            return  # a hub id, whose files may not be here yet
        headers = _headers(path, self.device, self._settings.dtype, ())
        for k, entry in enumerate(request.control or ()):
            try:
                headers.control(entry.file)
            except CheckpointError as error:
                raise CheckpointError(f"control[{k}].file: {error}") from None
        for k, adapter in enumerate(request.ip_adapter or ()):
            try:
                headers.ip_adapter(adapter)
            except CheckpointError as error:
                raise CheckpointError(f"ip_adapter[{k}].file: {error}") from None

    def plan(self, model: str, vae: str | None, request: Request, memory: str | None = None) -> MemoryPlan:
        """Plan the memory of a request, without loading the model.

        Raises:
            BudgetError: If it does not fit.
        """
        return self._plan((model, vae), request, memory or self._settings.memory or "auto", self._options(vae))

    def batch_for(self, model: str, vae: str | None, request: Request, count: int) -> int:
        """Return how many of so many requests, which are alike, can be drawn in one batch.

        Raises:
            BudgetError: If not even one fits.
        """
        found = self.plan(model, vae, request.replace(count=count, batch=count)).requests[0]
        area = (found.width or 1) * (found.height or 1) * (found.hires or 1) ** 2
        return max(min(found.batch or 1, count, int(self._settings.limits.batch_pixels // area)), 1)

    def _plan(
        self, key: tuple[str, str | None], request: Request, memory: str, options: Mapping[str, Any]
    ) -> MemoryPlan:
        from mezzotint.memory.planner import plan

        headers = _headers(self.paths[key[0]], self.device, self._settings.dtype, tuple(options.items()))
        return plan(headers, memory, request)


@lru_cache(maxsize=64)
def _headers(model: str | None, device: str | None, dtype: str | None, options: tuple[tuple[str, Any], ...]) -> Any:
    from mezzotint.memory.headers import ModelHeaders

    return ModelHeaders.of(model, device=device, dtype=dtype, **dict(options))


@lru_cache(maxsize=64)
def _own_settings(model: str | None, device: str | None, dtype: str | None) -> dict[str, Any]:
    from mezzotint.request import Request

    resolved = _headers(model, device, dtype, ()).plan(Request(prompt="")).request
    names = ("width", "height", "steps", "guidance_scale", "sampler", "spacing")
    return {name: getattr(resolved, name) for name in names}


def _kind_near_adapters(path: Path) -> tuple[str, Path]:
    """Return which listing a file in the folder of IP-Adapters is in, and the path that is listed."""
    try:
        found = path.stat()
        return _adapter_kind(path, found.st_mtime_ns, found.st_size)
    except (OSError, CheckpointError):
        return "", path


@lru_cache(maxsize=1024)
def _adapter_kind(path: Path, _changed: int, _size: int) -> tuple[str, Path]:
    from mezzotint.entries.ip_adapter import TENSOR
    from mezzotint.weights.files import TensorFile
    from mezzotint.weights.ip_adapter_files import PREFIXES
    from mezzotint.weights.vision_files import CLASS_TOKEN, is_vision_folder

    keys = TensorFile(path).entries.keys()
    if any(key.startswith(PREFIXES) for key in keys):
        return "ip_adapters", path
    if is_vision_folder(path.parent):
        return "encoders", path.parent
    return ("encoders" if CLASS_TOKEN in keys else "image_embeds" if TENSOR in keys else ""), path


def _name_models(given: Sequence[str]) -> dict[str, str | None]:
    """Return models by name: the last part of a path, or a hub id; equal names get numbers."""
    found: dict[str, str | None] = {}
    for model in given:
        path = Path(model).expanduser()
        name = (path.stem if path.is_file() else path.resolve().name) if path.exists() else model
        first, number = name, 2
        while name in found:
            name, number = f"{first} ({number})", number + 1
        found[name] = str(path) if path.exists() else model
    return found or {BUNDLED.name: None}
