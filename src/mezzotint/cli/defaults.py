"""Defaults of options: a file in the user's configuration folder, and MEZZOTINT_* variables, which override it.

They hold for the commands of `COMMANDS` alone. `again` takes everything from the picture's record and `train` from its
recipe, so that neither gives another result on another machine; the Python API reads neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from mezzotint.cli.naming import names_several
from mezzotint.errors import RequestError

KEYS = {  # and an example of a value
    "model": "path/to/model.safetensors",
    "device": "cuda",
    "dtype": "float16",
    "out": "~/Pictures/",
    "sampler": "dpmpp_2m",
}
_LOADS = ("model", "device", "dtype")
COMMANDS = {  # the keys that are defaults of each command's options
    "generate": tuple(KEYS),
    "shell": tuple(KEYS),
    "plan": (*_LOADS, "sampler"),
    "explain": (*_LOADS, "sampler"),
    "tokens": ("model",),
    "bulk": _LOADS,
    "grid": _LOADS,
    "report": _LOADS,
}
FILE = "MEZZOTINT_CONFIG"  # the variable that names another file, or none if it is empty
DTYPES = ("float32", "bfloat16", "float16", "auto")  # of devices.dtype_on, whose import would bring torch
MAX_BYTES = 1_000_000


class Default(NamedTuple):
    """A value, and where it comes from."""

    value: str
    source: str


def config_path() -> Path | None:
    """Return the path of the configuration file, which need not exist; None if it is turned off."""
    if (named := os.environ.get(FILE)) is not None:
        return Path(named).expanduser() if named else None
    import platformdirs

    return Path(platformdirs.user_config_dir("mezzotint", appauthor=False)) / "config.toml"


def read_defaults() -> dict[str, Default]:
    """Return the defaults by key.

    Raises:
        RequestError: If the file cannot be read, or a key or value in it is wrong.
    """
    found: dict[str, Default] = {}
    path = config_path()
    for key, value in (_read(path) if path else {}).items():
        if key not in KEYS:
            raise RequestError(f"{path} has the key {key!r}; the keys are {', '.join(KEYS)}")
        if not isinstance(value, str) or not value:
            raise RequestError(f'{path}: {key} is {value!r}; it must be text, such as {key} = "{KEYS[key]}"')
        found[key] = Default(value, str(path))
    for key in KEYS:
        if value := os.environ.get(f"MEZZOTINT_{key.upper()}"):
            found[key] = Default(value, f"MEZZOTINT_{key.upper()}")
    for key, default in found.items():
        _check(key, default)
    for key in ("model", "out"):
        if key in found:
            found[key] = found[key]._replace(value=os.path.expanduser(found[key].value))
    if "out" in found and not names_several(found["out"].value):
        value, source = found["out"]
        right = "it must be a folder, such as ~/Pictures/, or a pattern, so that no picture replaces another one"
        raise RequestError(f"{source}: out is {value!r}; {right}")
    return found


def _check(key: str, default: Default) -> None:
    """Check a value that needs no model to be checked; the error of the option would not say where it is from."""
    if key == "sampler":
        from mezzotint.samplers.names import canonical_name

        try:
            canonical_name(default.value)
        except RequestError as error:
            raise RequestError(f"{default.source}: {error}") from None
    if key == "dtype" and default.value not in DTYPES:
        raise RequestError(f"{default.source}: dtype is {default.value!r}; it can be {', '.join(DTYPES)}")


def defaults_of(command: str | None) -> dict[str, str]:
    """Return the defaults of a command's options."""
    keys = COMMANDS.get(command or "", ())
    return {key: default.value for key, default in read_defaults().items() if key in keys} if keys else {}


def _read(path: Path) -> dict[str, object]:
    """Return the content of the file; nothing if it does not exist and was not named."""
    import tomllib

    from mezzotint.files import read_text

    try:
        return tomllib.loads(read_text(path, limit=MAX_BYTES))
    except FileNotFoundError:
        if FILE in os.environ:
            raise RequestError(f"{FILE} is {str(path)!r}, which does not exist; it must be a TOML file") from None
        return {}
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # of TOML and of UTF-8
        raise RequestError(f"{path} is not a TOML file ({error})") from None
