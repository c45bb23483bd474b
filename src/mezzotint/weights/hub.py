"""Find a model by its path, the bundled model's name, or a hub id.

A hub id, "owner/name", becomes a local folder with the files that generation needs, from the cache or downloaded. A
path that exists, or that looks like a path, never reaches the network. A cached model is used without asking. What is
no whole model may be a file or folder inside of a repository: "owner/name/folder/file.safetensors".
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mezzotint.errors import CheckpointError
from mezzotint.model_options import ModelOptions
from mezzotint.models.tokenizer import FILES as TOKENIZER_FILES
from mezzotint.weights.folder import choose_weights, plan_folder, read_json
from mezzotint.weights.model_files import NETWORKS

BUNDLED = Path(__file__).parents[1] / "data" / "emoji"
BUNDLED_CONTROL = BUNDLED.with_name("emoji-outline")  # its ControlNet
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
BESIDE = ("config.json", "adapter_config.json")  # what describes a file may be beside it
TIMEOUT = 10.0  # seconds for the hub's first answer
Choose = Callable[[Iterable[str]], list[str]]  # chooses among the names of a repository's files
DESCRIPTIONS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": TOKENIZER_FILES,
    "tokenizer_2": TOKENIZER_FILES,
    "feature_extractor": ("preprocessor_config.json",),
}


def locate(path_or_id: str | Path, options: ModelOptions = ModelOptions()) -> Path:  # noqa: B008  # frozen
    """Return the file or folder of a model: an existing path, the bundled model, or a snapshot from the hub.

    Of a hub's model, the weights of the variant are downloaded, without those of a VAE or a safety checker if the
    options give another one, or none.

    Raises:
        CheckpointError: If the path does not exist, or the model cannot be downloaded.
    """
    if here := local(path_or_id):
        return here
    name = str(path_or_id)
    if isinstance(path_or_id, Path) or not HUB_ID.fullmatch(name) or name.endswith(FILES):
        raise CheckpointError(
            f"{name[:200]!r} does not exist; give a model folder, a .safetensors or .ckpt file, "
            "or a hub id (owner/name)"
        )
    cached = _find_cached(name, options)
    if cached and (options.safety_checker is not True or _has_checker(cached, options)):
        return cached
    try:
        return _download_model(name, options)
    except CheckpointError:
        if cached:  # without the checker, which is said when pictures are drawn
            return cached
        raise


def local(path_or_id: str | Path) -> Path | None:
    """Return the path if it exists, the bundled model's folder for its name, or None."""
    path = Path(path_or_id).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # too long, or a NUL byte: then it is no hub id either
        pass
    return BUNDLED if str(path_or_id) == BUNDLED.name else None


def _find_cached(name: str, options: ModelOptions) -> Path | None:
    """Return the snapshot in huggingface_hub's cache if it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=["model_index.json"]))
        needed_of = ModelOptions(variant=options.variant, vae=options.vae)
        return None if plan_folder(folder, needed_of).problems else folder
    except (OSError, ValueError, HfHubHTTPError, CheckpointError):  # ValueError: a name that the hub does not allow
        return None


def _has_checker(folder: Path, options: ModelOptions) -> bool:
    """Return whether a snapshot has the safety checker that it names: not if it was downloaded without one."""
    named = read_json(folder / "model_index.json").get("safety_checker")
    if not isinstance(named, list) or not all(named):
        return True
    there = (file.relative_to(folder).as_posix() for file in (folder / "safety_checker").glob("*"))
    try:
        return bool(network_files(there, "safety_checker/", options.variant))
    except CheckpointError:
        return False


def resource(source: str, what: str, choose: Choose) -> Path:
    """Return the file or folder of a LoRA or the like: an existing path, or a file or folder of a hub repository.

    Args:
        source: A path, a hub id, or a hub id and a path inside of the repository.
        what: Its kind, for error messages.
        choose: Chooses the files to download among those of the repository or of its folder.

    Raises:
        CheckpointError: If the path does not exist, or `choose` or the download fails.
    """
    path = Path(source).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # too long, or a NUL byte
        pass
    found = split_id(source)
    if found is None:
        raise CheckpointError(
            f"the {what} {source[:200]!r} does not exist; give a .safetensors, .bin or .pt file, a folder with it, "
            "or a hub id (owner/name, or owner/name/path)"
        )
    name, inside = found
    return snapshot(name, partial(_choose_inside, name, inside, choose)) / inside if inside else snapshot(name, choose)


def split_id(source: str) -> tuple[str, str] | None:
    """Return the hub id in a text, and the path inside of the repository, which may be empty.

    None if the text is a path of this machine: it has another form, or begins with a folder that is here.
    """
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    if not HUB_ID.fullmatch(f"{owner}/{name}") or name.endswith(FILES):
        return None
    if inside and (Path(owner).exists() or {"", ".", ".."} & {*inside.split("/")} or not inside.isprintable()):
        return None
    return f"{owner}/{name}", inside


def _choose_inside(name: str, inside: str, choose: Choose, listing: Iterable[str]) -> list[str]:
    """Choose a file of a repository and what describes it, or the files of a folder."""
    names = set(listing)
    if inside in names:
        folder = inside[: inside.rfind("/") + 1]
        return [inside, *({f"{folder}{each}" for each in BESIDE} & names)]
    below = [each.removeprefix(f"{inside}/") for each in names if each.startswith(f"{inside}/")]
    if not below:
        raise CheckpointError(f"{name} on the hub has no file or folder {inside}")
    return [f"{inside}/{each}" for each in choose(below)]


def snapshot(name: str, choose: Choose) -> Path:
    """Return a snapshot of the files that `choose` picks from a hub repository, cached or downloaded.

    Raises:
        CheckpointError: If `choose` finds no suitable file, or the download fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))  # whatever is there of it
        choose([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
        return folder
    except (OSError, ValueError, HfHubHTTPError, CheckpointError):
        return _download(name, choose)


def _download_model(name: str, options: ModelOptions) -> Path:
    def choose(listing: Iterable[str]) -> list[str]:
        files = needed(listing, options)
        if "model_index.json" not in files:
            raise CheckpointError(
                f"{name} on the hub has no model_index.json; to use a single file of it, download it and give its path"
            )
        return files

    return _download(name, choose)


def _download(name: str, choose: Choose) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        listing = HfApi().model_info(name, timeout=TIMEOUT).siblings or []  # fails at once when there is no network
        files = choose([file.rfilename for file in listing])
        return Path(snapshot_download(name, allow_patterns=[glob.escape(file) for file in files]))
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{name} on the hub requires accepting a licence; accept it on the model's page and log in with "
            "`hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name!r} is neither a local path nor a model on the hub; for a private model, log in with `hf auth login`"
        ) from None
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{name!r} is not in the cache, and HF_HUB_OFFLINE is set; unset it to download the model"
        ) from None
    except Exception as error:  # the client passes on whatever its HTTP library, the disk or the server met
        first = (str(error).strip().splitlines() or [""])[0]
        if not first or isinstance(error, KeyError | TypeError | AttributeError):
            first = f"the hub's answer cannot be read ({type(error).__name__}: {first})"
        raise CheckpointError(f"{name!r} is not in the cache and could not be downloaded: {first}") from error


def needed(listing: Iterable[str], options: ModelOptions) -> list[str]:
    """Return the files of a repository that generation needs: configs, and each network's weights in one format."""
    listing = set(listing)
    files = ["model_index.json", "mezzotint.json", "lcm_lora.safetensors"]
    # a Request names those that it uses
    spared = {"controlnet", "controlnet_union", "t2i_adapter", "image_encoder"}
    if options.vae is not None:
        spared.add("vae")
        files.append("vae/config.json")  # it says what the UNet's latents are
    if options.safety_checker is not True:
        spared |= {"safety_checker", "feature_extractor"}
    files += [f"{folder}/{name}" for folder, names in DESCRIPTIONS.items() for name in names if folder not in spared]
    for part in NETWORKS:
        if part not in spared:
            files += network_files(listing, f"{part}/", options.variant)
    return sorted(name for name in files if name in listing)


def network_files(listing: Iterable[str], folder: str, variant: str | None) -> list[str]:
    """Return a network's config and weights among a repository's files; none if it has no weights there.

    Args:
        listing: The names of all files.
        folder: The network's folder and a slash, or "".
        variant: As for `open_model`.

    Raises:
        CheckpointError: If shards are missing.
    """
    inside = [name.removeprefix(folder) for name in listing if name.startswith(folder)]
    chosen = choose_weights(inside, variant)
    if chosen is None:
        return []
    files = ["config.json", chosen]
    if chosen.endswith(".json"):  # stem.safetensors.index.fp16.json -> stem.fp16-00001-of-00002.safetensors
        stem, suffix, kind = re.fullmatch(r"(\w+)\.(\w+)\.index(\.\w+)?\.json", chosen).groups(default="")  # type: ignore[union-attr]
        shard = re.compile(rf"{stem}({re.escape(kind)}-\d+-of-\d+|-\d+-of-\d+{re.escape(kind)})\.{suffix}")
        shards = [leaf for leaf in inside if shard.fullmatch(leaf)]
        for count in {int(count) for leaf in shards for count in re.findall(r"-of-(\d+)", leaf)} - {len(shards)}:
            raise CheckpointError(f"{folder}{chosen} needs {count} shards, and {len(shards)} are there; all must be")
        files += shards
    return [f"{folder}{name}" for name in files]
