"""The LoRA files that a request names: in `loras`, and in its prompt by the name of a file or of its training."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from mezzotint.errors import RequestError
from mezzotint.prompt import Network
from mezzotint.request import Request
from mezzotint.weights.listing import list_files
from mezzotint.weights.lora import Scale
from mezzotint.weights.lora_files import named_outputs
from mezzotint.weights.model_files import join_names

MAX_LORA_SCALE = 100
KINDS = ("lora", "lyco")  # the second, of A1111's LyCORIS extension, means the same
SUFFIXES = (".safetensors", ".pt", ".bin")


def named_loras(request: Request, networks: Sequence[Network] = ()) -> tuple[tuple[str, Scale], ...]:
    """Return the LoRA files of a request, each with its scale: `loras`, then those that its prompt names.

    Args:
        request: A request; only `loras` and `lora_folder` are read.
        networks: What the parsed prompt names, as `<lora:name:scale>`.

    Raises:
        RequestError: If the prompt names a file that is not in `lora_folder`, or several, or an invalid scale.
    """
    found = [(entry[0], _scale(*entry[1:])) for entry in request.loras or ()]
    wanted = [network for network in networks if network.kind in KINDS]
    if request.lora_folder and networks:
        files = lora_files(request.lora_folder)
        found += [_find(network, files) for network in wanted]
    return tuple(found)


def lora_files(folder: str) -> dict[str, str]:
    """Return the paths of the LoRA files in a folder and below it, by file name in lower case.

    Raises:
        RequestError: If there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RequestError(f"lora_folder is {folder[:200]!r}; it must be an existing folder")
    files = list_files(root, SUFFIXES)
    place = str(root)
    return {name.rpartition("/")[2].rpartition(".")[0].lower(): f"{place}/{name}" for name in reversed(files)}


def _scale(unet: float, text: float | None = None, blocks: tuple[tuple[str, float], ...] = ()) -> Scale:
    """Return an entry of `loras` as a Scale."""
    return Scale(unet, unet if text is None else text, blocks)


def _find(network: Network, files: dict[str, str]) -> tuple[str, Scale]:
    """Return the file that `<lora:name:text scale:UNet scale>`, or te= and unet=, names, as A1111 reads it."""
    path = files.get(network.name.lower()) or _find_output(network.name, files)
    try:
        text = float(network.options.get("te", network.args[0] if network.args else 1.0))
        unet = float(network.options.get("unet", network.args[1] if len(network.args) > 1 else text))
        if not max(abs(unet), abs(text)) <= MAX_LORA_SCALE:
            raise ValueError
    except ValueError:
        raise RequestError(
            f"prompt gives the LoRA {network.name[:100]!r} an invalid scale; it must be a number from "
            f"-{MAX_LORA_SCALE} to {MAX_LORA_SCALE}"
        ) from None
    return path, Scale(unet, text)


def _find_output(name: str, files: dict[str, str]) -> str:
    """Return the file that was trained under a name. Raises RequestError if there is none, or several."""
    found = sorted(named_outputs(name, files.values()))
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(
            f"prompt names the LoRA {name[:100]!r}, the ss_output_name of {len(found)} files in lora_folder; name one "
            f"of the files: {join_names([Path(path).stem for path in found])}"
        )
    near = get_close_matches(name.lower(), files, 1)
    raise RequestError(
        f"prompt names the LoRA {name[:100]!r}, which is not in lora_folder; "
        + (f"the nearest is {near[0]}" if near else f"it has {join_names(sorted(files)) or 'none'}")
    )
