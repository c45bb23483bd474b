"""Bodies and replies: JSON that is read strictly, errors in one form, and the schemas of bodies for OpenAPI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse as _JSONResponse
from starlette.responses import Response

from mezzotint.server.errors import InvalidError, ServerError

Body = TypeVar("Body", bound=BaseModel)
REFERENCE = "#/components/schemas/{model}"
bodies: dict[str, type[BaseModel]] = {}  # by name, for the components of the OpenAPI document


class JSONResponse(_JSONResponse):
    """JSON in which a text without a valid encoding is escaped, so that it can always be sent."""

    def render(self, content: Any) -> bytes:
        """Encode the content."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class UnsupportedError(ServerError):
    """The body is of another type."""

    status, code = 415, "unsupported_media_type"


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a JSON body."""
    bodies[model.__name__] = model
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


async def read_json(request: Request, model: type[Body]) -> Body:
    """Return the body of a request.

    The type must be JSON: a page of another origin can send other types without asking.

    Raises:
        UnsupportedError: If it is of another type.
        InvalidError: If it is not JSON, or does not have the form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedError("the body must be JSON, with the Content-Type application/json")
    data = await request.body()
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidError:
    """Return the first of pydantic's findings as a sentence."""
    finding = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [
        str(place) for place in finding["loc"] if not str(place).startswith(("function-", "tuple[", "constrained"))
    ]
    param = next((place for place in reversed(places) if place.isidentifier() and place.islower()), None)
    if finding["type"] == "json_invalid":
        return InvalidError(f"the body is not valid JSON: {finding['msg']}")
    where = ".".join(places[:4])[:200] or "the body"
    return InvalidError(f"{where}: {finding['msg']}", param)


def error_reply(
    message: str,
    status: int,
    *,
    type: str = "invalid_request_error",
    code: str = "invalid_request",
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in the one form that all routes have, which is also OpenAI's."""
    error = {"type": type, "message": message, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers=dict(headers or {}))


def reply_to(error: ServerError) -> Response:
    """Return the reply to an error."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return error_reply(str(error), error.status, type=error.type, code=error.code, param=error.param, headers=headers)


async def read_upload(request: Request) -> bytes:
    """Return the file in a body: the body itself, or the one file of a form.

    Raises:
        InvalidError: If there is none, or several.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        data = await request.body()
    else:
        try:
            async with request.form(max_files=1, max_fields=10) as form:
                files = [value for value in form.values() if not isinstance(value, str)]
                data = await files[0].read() if files else b""
        except HTTPException as error:
            raise InvalidError(f"the form cannot be read: {error.detail}") from None
    if not data:
        raise InvalidError("the body must be a file, or a form with one file", "file")
    return data


def upload_schema() -> dict[str, Any]:
    """Return the OpenAPI description of a body with a file."""
    file = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"file": file}, "required": ["file"]}
    kinds = ("image/png", "image/jpeg", "image/webp")
    content = {"multipart/form-data": {"schema": form}, **{kind: {"schema": file} for kind in kinds}}
    return {"requestBody": {"required": True, "content": content}}
