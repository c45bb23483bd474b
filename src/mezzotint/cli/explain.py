"""`mezzotint explain`: draw a picture, and show where the model attended to each word of the prompt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mezzotint.cli.draw import FLAGGED
from mezzotint.cli.fields import fields_of, read_prompt
from mezzotint.cli.naming import check_out
from mezzotint.cli.options import (
    OUTPUT,
    ClipSkip,
    Device,
    Dtype,
    Embedding,
    Guidance,
    Json,
    Model,
    Negative,
    Prompt,
    Safety,
    Sampler,
    Seed,
    Size,
    Spacing,
    Steps,
    Syntax,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import load, long_work, print_json, say, show
from mezzotint.errors import RequestError

if TYPE_CHECKING:
    from mezzotint.explain.maps import Explanation


@add_options_of(model_options)
def explain(
    prompt: Prompt,
    out: Annotated[str, option("File for the page; an existing one is replaced.", "FILE.png", OUTPUT, name="--out -o")],
    arrays: Annotated[
        Path | None, option("File for the attention maps themselves, for numpy.", "FILE.npz", OUTPUT)
    ] = None,
    model: Model = None,
    syntax: Syntax = None,
    embedding: Embedding = None,
    negative: Negative = None,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    spacing: Spacing = None,
    seed: Seed = None,
    clip_skip: ClipSkip = None,
    safety: Safety = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Draw a picture, and show where each word took effect."""
    options = locals()
    model_given = take_model_options(overrides, safety)
    from mezzotint.request import Request

    request = Request(prompt=read_prompt(prompt), **fields_of(options))
    if os.path.isdir(out) or not out.lower().endswith(".png"):
        raise RequestError(f"out is {out!r}; it must be a file name ending in .png")
    check_out(out, request)
    if arrays is not None and (arrays.suffix != ".npz" or not os.access(arrays.parent, os.W_OK)):
        raise RequestError(f"arrays is {str(arrays)!r}; it must end in .npz and be in a writable folder")

    from mezzotint.explain.maps import explain as run
    from mezzotint.explain.page import page
    from mezzotint.images.io import save_png

    pipe = load(model, device, dtype, **model_given)
    with long_work("drawing", lambda: "no page was finished") as on_step:
        explanation = run(pipe, request, on_step=on_step)
    result = explanation.result
    if result.flagged == [True]:
        say(f"the picture is {FLAGGED[result.request.safety or 'flag']}")
    save_png(page(explanation), out)
    written = {"page": out}
    if arrays is not None:
        _save_arrays(explanation, arrays)
        written["arrays"] = str(arrays)
    request = result.request
    if as_json:
        flagged = result.flagged[0] if result.flagged else None
        described = {"words": _words(explanation), "flagged": flagged, "request": request.model_dump(mode="json")}
        print_json({**written, **described})
    else:
        show(f"Wrote {' and '.join(written.values())} ({len(explanation.words)} words, seed {request.seed})")


def _words(explanation: Explanation) -> list[dict[str, Any]]:
    """Describe each word: its place in the prompt, its share of all attention, and the centre of its map.

    The centre is (x, y) from 0 at the left and the top to 1, and null for a word whose map is empty.
    """
    import torch

    found = []
    for word in explanation.words:
        heat = explanation.map(word)
        mass = heat / heat.sum()
        spots = [torch.linspace(0.5 / n, 1 - 0.5 / n, n) for n in heat.shape]
        y, x = float((mass.sum(1) * spots[0]).sum()), float((mass.sum(0) * spots[1]).sum())
        found.append(
            {
                "word": word.text,
                "start": word.start,
                "end": word.end,
                "share": round(explanation.share(word), 5),
                "middle": [round(x, 3), round(y, 3)] if heat.any() else None,
            }
        )
    return found


def _save_arrays(explanation: Explanation, path: Path) -> None:
    """Save the maps of the one picture under the names that docs/explain.md lists."""
    import numpy as np

    kept: dict[str, Any] = {
        "picture": np.asarray(explanation.result.images[0]),
        "tokens": np.array([token.text for token in explanation.tokens]),
        "places": np.array([(token.start, token.end) for token in explanation.tokens]),
        "layers": np.array(explanation.layers),
        "steps": np.array(explanation.steps[0]),
    }
    kept |= {f"layer_{k}": shares.numpy() for k, shares in enumerate(explanation.maps[0])}
    np.savez_compressed(path, **kept)
