"""How a model is placed: where its weights are, how they are stored, and how its work is split. Does not import torch.

`Placement()` is the fastest: all weights on the device, nothing split. Every other value saves memory and costs time;
docs/memory.md has the figures. `mezzotint.plan` chooses a placement for a memory budget.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import BudgetError, RequestError

UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}B": 10 ** (3 * k) for k, letter in enumerate("KMGTPE", 1)}
UNITS |= {f"{letter}iB": 2 ** (10 * k) for k, letter in enumerate("KMGTPE", 1)}
MIN_OFFLOAD_NUMEL = 65_536  # smaller weights stay parameters on the device, whatever the placement
DEFAULT_SLICE_BYTES = 8 * 2**20  # scores of one slice of attention: about a processor's cache
MAX_BUDGET_BYTES = 2**50  # more than any machine has


class Placement(BaseModel):
    """How to run a model. Frozen, and part of a picture's record, since the bits depend on it.

    Attributes:
        weights: "resident": all weights are on the device. "offload": each network is there only while it runs (on
            the CPU: it is read from its files then). "stream": each layer is there only while it runs.
        storage: The format in which large weights are stored until a layer uses them; None: the dtype that is computed
            in.
        attention: A backend of models/attention.py, or "sliced:64MiB" with the bytes that its scores may use.
        guidance: "batched": the network gets all conditions in one call. "split": one condition a call.
        vae: "whole". "strips": layer by layer in strips of rows, exact. "tiles": in overlapping tiles, approximate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Literal["resident", "offload", "stream"] = "resident"
    storage: Literal["bfloat16", "float16", "float8", "int8", "int8_dynamic"] | None = None
    attention: str = Field(default="auto", pattern=r"^(auto|sdpa|math|xformers|flash|sage|sliced(:\d+([KMG]i?)?B)?)$")
    guidance: Literal["batched", "split"] = "batched"
    vae: Literal["whole", "strips", "tiles"] = "whole"

    @classmethod
    def of(cls, **fields: Any) -> Placement:
        """Make a Placement with these fields.

        Raises:
            RequestError: If a field or value is unknown.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise RequestError(f"placement: {name} is {first['input']!r}: {first['msg']}") from None

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults."""
        return self.model_dump(exclude_defaults=True)


def parse_size(text: str | int, name: str = "memory") -> int:
    """Parse a size.

    Args:
        text: A size such as "4GiB" or "600 MB", or a number of bytes.
        name: The name of the value in error messages.

    Returns:
        The number of bytes.

    Raises:
        BudgetError: If it is not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        unit = next((size for name, size in UNITS.items() if found and name.lower() == found[2].lower()), None)
        if not found or unit is None:
            auto = " or auto" if name == "memory" else ""
            raise BudgetError(f"{name} is {str(text)[:60]!r}; it must be a size such as 4GiB, 600MB{auto}")
        count = int(min(float(found[1]) * unit, 2 * MAX_BUDGET_BYTES))  # the digits may spell more than a float holds
    if not 0 < count <= MAX_BUDGET_BYTES:
        raise BudgetError(f"{name} is {str(text)[:60]!r}; it must be more than 0 and at most 1024 TiB")
    return count


def format_size(count: float) -> str:
    """Format bytes for people, as in "1.25 GiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"
