"""Error messages about a body, in the style of Request: the field, its value, and what it must be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mezzotint.errors import REQUEST_ALIASES, suggest
from mezzotint.request import brief
from mezzotint.server.errors import InvalidError


def parse_json(data: bytes) -> Any:
    """Return the value of JSON text, read strictly: UTF-8, no key twice, no NaN or infinity, not too deep.

    Raises:
        InvalidError: If it is something else.
    """
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_reject, parse_float=_finite, parse_int=_whole
        )
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)[:200]
    raise InvalidError(f"the body is not valid JSON: {reason}")


def explain(error: ValidationError, model: type[BaseModel], data: Any) -> InvalidError:
    """Return the first of pydantic's findings as an error that names the field.

    Args:
        error: The findings.
        model: What the data were to be.
        data: The data.
    """
    finding = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if finding["type"] == "json_invalid":  # which Python's parser has taken: only what is not Unicode is left
        name, text = _not_unicode(data, "the body")
        return InvalidError(f"{name} is {brief(text)}, which is not Unicode", name)
    if not finding["loc"]:
        return InvalidError(f"the body is {brief(data)}; it must be an object with the fields of {model.__name__}")
    names: list[str] = []
    kind: type[BaseModel] | None = model
    value, description = data, None
    for place in finding["loc"]:
        if kind is None:
            break  # inside of the field's value
        value = _item(value, place)
        if not (isinstance(place, str) and place == "request"):  # the one request of a body needs no place
            names.append(str(place)[:100])
        if isinstance(place, str):
            if finding["type"] == "extra_forbidden" and place not in kind.model_fields:
                aliases = REQUEST_ALIASES if kind.__name__ == "JobBody" else {}
                hint = suggest(place, aliases, kind.model_fields)
                return InvalidError(f"{kind.__name__} has no field {brief(place)}; {hint}", place[:100])
            field = kind.model_fields.get(place)
            description = field.description if field else None
            kind = _model_in(field.annotation) if field else None
    param = next((name for name in reversed(names) if not name.isdigit()), str(finding["loc"][0])[:100])
    where = ".".join(names) or param
    if finding["type"] == "missing":
        return InvalidError(f"{where} is missing" + (f"; it must be {description}" if description else ""), param)
    state = f"{where} is {brief(value)}"
    if finding["type"] == "string_unicode":
        state += ", which is not Unicode"
    return InvalidError(f"{state}; it must be {description}" if description else f"{state}; {demand(finding)}", param)


def demand(finding: Mapping[str, Any]) -> str:
    """Return what a finding of pydantic asks for: "it must be greater than 0"."""
    text = str(finding["msg"]).partition(", unable")[0]
    said, count = re.subn("^[A-Z][a-z]+ should ", "it must ", text)
    return said if count else f"{text[:1].lower()}{text[1:]}"


def _item(value: Any, place: str | int) -> Any:
    """Return an item of an object or a list; None if it has none there."""
    try:
        return value[place]
    except (KeyError, IndexError, TypeError):
        return None


def _not_unicode(value: Any, name: str) -> tuple[str, str]:
    """Return the key and the value of the first text with half of a surrogate pair; "" if there is none."""
    if isinstance(value, str):
        return name, value if any("\ud800" <= letter <= "\udfff" for letter in value) else ""
    parts = (
        value.items()
        if isinstance(value, dict)
        else ((name, item) for item in value)
        if isinstance(value, list)
        else ()
    )
    found = ((name, key) if _not_unicode(key, "")[1] else _not_unicode(item, key) for key, item in parts)
    return next((one for one in found if one[1]), (name, ""))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation such as `list[Model] | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {brief(next(name for name in names if names.count(name) > 1))} appears twice")
    return found


def _reject(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:60]} is too large for a number")
    return value


def _whole(text: str) -> int:
    if len(text) > 400:  # beyond a float's largest; Python's own bound is 4,300 digits
        raise ValueError("a number has more than 400 digits")
    return int(text)
