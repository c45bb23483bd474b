"""A hook of mkdocs: tables of the reference pages, made from the code that they describe.

A page asks for one by a line of its own, `<!-- table: request -->`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import typer.main

from mezzotint.cli.commands import EXAMPLES, app
from mezzotint.request import Request
from mezzotint.samplers.names import FEW_STEPS, SPACINGS, TABLE

MARK = re.compile(r"^<!-- table: ([a-z-]+) -->$", re.MULTILINE)
WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "bytes": "bytes"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark of a page by its table."""
    return MARK.sub(lambda mark: "\n".join(TABLES[mark[1]]()), markdown)


def request_fields() -> Iterator[str]:
    """Yield a table of the fields of a Request: name, type, default, what it must be."""
    yield from ("| field | type | default | value |", "|---|---|---|---|")
    defaults = {
        parameter.name: DEFAULT.search(parameter.help or "") for parameter in commands_of()["generate"].params[1:]
    }
    for name, field in Request.model_fields.items():
        found = defaults.get(OPTION.get(name, name))
        default = "required" if field.is_required() else field.default or (found[1] if found else "none")
        yield row(f"`{name}`", spell(field.annotation), default, field.description)


DEFAULT = re.compile(r"\[default: (.*)\]$")
OPTION = {  # parameters of `generate` that are not named as their field
    "negative_prompt": "negative",
    "prompt_syntax": "syntax",
    "guidance_scale": "guidance",
    "width": "size",
    "height": "size",
}


def commands_of() -> dict[str, Any]:
    """Return the commands of the command line by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def samplers() -> Iterator[str]:
    """Yield a table of the samplers and their properties."""
    yield from ("| sampler | order | calls per step | adds noise | good for |", "|---|---|---|---|---|")
    for sampler in TABLE:
        noise = "yes" if sampler.stochastic else "no"
        yield row(f"`{sampler.name}`", sampler.order, sampler.calls, noise, sampler.good_for)


def sampler_names() -> Iterator[str]:
    """Yield a table of the samplers' names in other programs."""
    yield from ("| sampler | diffusers | A1111 | ComfyUI |", "|---|---|---|---|")
    for sampler in TABLE:
        names = (sampler.name, sampler.diffusers, sampler.a1111, sampler.comfyui)
        yield row(*(f"`{name}`" if name else "" for name in names))


def few_steps() -> Iterator[str]:
    """Yield a table of the presets for models distilled to a few steps."""
    yield from ("| name | sampler | steps | guidance scale |", "|---|---|---|---|")
    for name, (base, _, steps, scale) in FEW_STEPS.items():
        yield row(f"`{name}`", f"`{base}`", steps, f"{scale:g}")


def spacings() -> Iterator[str]:
    """Yield the names of the spacings."""
    yield ", ".join(f"`{name}`" for name in SPACINGS) + "."


def commands() -> Iterator[str]:
    """Yield the help of every command."""
    found = commands_of()
    for function, example in EXAMPLES.items():
        command = found[function.__name__]
        with command.make_context(f"mezzotint {command.name}", [], resilient_parsing=True) as context:
            text = command.get_help(context)
        yield from (f"### {command.name}", "", f"    mezzotint {example}", "", "```text", text, "```", "")


ESCAPES = {ord(letter): f"&#{ord(letter)};" for letter in "|<{}"}  # which Markdown would read as markup

TABLES = {
    "request": request_fields,
    "samplers": samplers,
    "sampler-names": sampler_names,
    "few-steps": few_steps,
    "spacings": spacings,
    "commands": commands,
}


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(str(cell).translate(ESCAPES) for cell in cells)} |"


def spell(annotation: Any) -> str:
    """Return a type in words: "text", "whole number", "list of numbers", "(number, number)"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(spell(a) for a in arguments if a is not type(None)))
    if hasattr(annotation, "__metadata__"):
        return spell(arguments[0])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {spell(arguments[0])}"
        return f"({', '.join(spell(a) for a in arguments)})"
    return WORDS.get(getattr(annotation, "__name__", ""), str(annotation))
