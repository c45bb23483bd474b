"""Bodies and replies: JSON that is read strictly, errors in one form, and the schemas of bodies for OpenAPI."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse as _JSONResponse
from starlette.responses import Response

from mezzotint.server.errors import InvalidError, ServerError
from mezzotint.server.sentences import explain, parse_json

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
    value = parse_json(data)
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise explain(error, model, value) from None


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


@asynccontextmanager
async def open_form(request: Request, *, files: int, fields: int) -> AsyncIterator[FormData]:
    """Parse a form, and close its files at the end.

    Args:
        request: The request.
        files: How many files it may have.
        fields: How many other fields it may have.

    Raises:
        InvalidError: If it cannot be parsed.
    """
    try:
        form = await request.form(max_files=files, max_fields=fields)
    except HTTPException as error:
        raise InvalidError(f"the form cannot be read: {error.detail}") from None
    except UnicodeError:  # of a charset in the Content-Type
        raise InvalidError("the form cannot be read: it must be UTF-8") from None
    try:
        yield form
    finally:
        await form.close()


async def read_upload(request: Request) -> bytes:
    """Return the file in a body: the body itself, or the one file of a form.

    Raises:
        InvalidError: If there is none, or several.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        data = await request.body()
    else:
        async with open_form(request, files=1, fields=10) as form:
            given = [value for value in form.values() if not isinstance(value, str)]
            data = await given[0].read() if given else b""
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
