"""Errors that the server answers with, each with the status and the code of its reply."""

from __future__ import annotations

from mezzotint.errors import MezzotintError


class ServerError(MezzotintError):
    """A request that is not served. Subclasses set the status of the reply, and its type and code.

    Args:
        message: What is wrong, and what would be right.
        param: The field that is wrong.
        retry_after: Seconds after which the client may try again.
    """

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param, self.retry_after = param, retry_after


class NotFoundError(ServerError):
    """There is no such job, picture, upload or name."""

    status, code = 404, "not_found"


class ConflictError(ServerError):
    """The job's state does not allow it."""

    status, code = 409, "conflict"


class TooLargeError(ServerError):
    """The body is larger than allowed."""

    status, code = 413, "too_large"


class InvalidError(ServerError):
    """A field is wrong."""

    status, code = 422, "invalid_value"


class QueueFullError(ServerError):
    """The queue holds as many jobs as it may."""

    status, type, code = 429, "rate_limit_error", "queue_full"


class UnavailableError(ServerError):
    """The server is stopping, or its disk is full."""

    status, type, code = 503, "server_error", "unavailable"
