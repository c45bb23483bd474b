"""Shared by the APIs of the two other programs: lenient parsing of bodies, and the errors of failed jobs."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mezzotint.server.bodies import UnsupportedError
from mezzotint.server.errors import InvalidError, ServerError
from mezzotint.server.files import inspect_picture
from mezzotint.server.schema import decode_base64
from mezzotint.server.sentences import explain, parse_json
from mezzotint.server.store import Job


class LooseBody(BaseModel):
    """A body in which unknown keys are ignored, null means absent, and a number may be given as a text."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the JSON body of a request.

    Raises:
        UnsupportedError: If it is of another type.
        InvalidError: If it is not JSON, or a field is wrong.
    """
    if media_type(request) != "application/json":  # a page of another origin can send other types without asking
        raise UnsupportedError("the body must be JSON, with the Content-Type application/json")
    return validate(model, parse_json(await request.body() or b"{}"))


def validate(model: type[Body], data: Any) -> Body:
    """Return a body of these values. Raises InvalidError with the first of pydantic's findings."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model, data) from None


def media_type(request: Request) -> str:
    """Return the type of a request's body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def decode_picture(text: str, param: str) -> bytes:
    """Return the bytes of a picture in base64, which may be a data: URI; a URL or a path is none.

    Raises:
        InvalidError: If it is not base64, or no PNG, JPEG or WebP file.
    """
    try:
        data = decode_base64(text, param)
    except InvalidError:
        raise InvalidError(f"{param} must be a PNG, JPEG or WebP file in base64, also as a data: URI", param) from None
    inspect_picture(data, param)
    return data


def failure(job: Job) -> ServerError:
    """Return the error of a job that has failed, or was cancelled."""
    facts = job.error or {"message": "the job was cancelled", "code": "cancelled"}
    error = InvalidError(str(facts.get("message")))
    error.code = str(facts.get("code", error.code))
    if error.code in ("internal", "bad_file"):  # nothing that the client could mend
        error.status, error.type = 500, "server_error"
    return error
