"""How a model is placed: where its weights are, what they are kept as, and how its work is cut. Words only, no torch.

`Placement()` is the fast way: all weights on the device, nothing cut. Each other value saves memory and costs time;
docs/memory.md says how much of each. `memory.plan` chooses one for a budget.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import BudgetError, RequestError

UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}B": 10 ** (3 * k) for k, letter in enumerate("KMGTPE", 1)}
UNITS |= {f"{letter}iB": 2 ** (10 * k) for k, letter in enumerate("KMGTPE", 1)}
MIN_OFFLOAD_NUMEL = 65_536  # numbers of a weight, below which it stays where it is, whatever the placement
SLICE = 8 * 2**20  # bytes of the scores of one slice of attention, unless said: what a processor's cache holds
MOST = 2**50  # bytes of a budget: what no machine has


class Placement(BaseModel):
    """One way to run a model. Frozen; part of a picture's record, since the bits depend on it.

    weights: "resident", all on the device; "offload", each network there only while it runs (on the CPU: read from its
    files when its turn comes); "stream", each layer there only while it runs. storage: what large weights are kept as
    until a layer uses them; None is the dtype that is computed in. attention: a backend of models/attention.py, or
    "sliced:64MiB" with the bytes that its scores may take. guidance: "batched" gives the network all conditions in one
    call, "split" one after another. vae: "whole"; "strips", layer by layer in strips of rows, exact; "tiles",
    overlapping pieces, approximate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Literal["resident", "offload", "stream"] = "resident"
    storage: Literal["bfloat16", "float16", "float8", "int8", "int8_dynamic"] | None = None
    attention: str = Field(default="auto", pattern=r"^(auto|sdpa|math|xformers|flash|sage|sliced(:\d+([KMG]i?)?B)?)$")
    guidance: Literal["batched", "split"] = "batched"
    vae: Literal["whole", "strips", "tiles"] = "whole"

    @classmethod
    def of(cls, **fields: Any) -> Placement:
        """Return a Placement with these fields; raise RequestError for an unknown field or value."""
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise RequestError(f"placement: {name} is {first['input']!r}: {first['msg']}") from None

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults."""
        return self.model_dump(exclude_defaults=True)


def bytes_of(text: str | int, name: str = "memory") -> int:
    """Parse a size such as "4GiB" or "600 MB" to bytes; raise BudgetError, naming `name`, if it is not one."""
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        unit = next((size for name, size in UNITS.items() if found and name.lower() == found[2].lower()), None)
        if not found or unit is None:
            auto = " or auto" if name == "memory" else ""
            raise BudgetError(f"{name} is {str(text)[:60]!r}; it must be a size such as 4GiB, 600MB{auto}")
        count = int(min(float(found[1]) * unit, 2 * MOST))  # the digits may spell more than a float holds
    if not 0 < count <= MOST:
        raise BudgetError(f"{name} is {str(text)[:60]!r}; it must be more than 0 and at most 1024 TiB")
    return count


def size(count: float) -> str:
    """Bytes as a person reads them: "1.25 GiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"
