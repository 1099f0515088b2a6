"""Errors in OpenAI's form: a status, and a body that says what is wrong with which field."""

from __future__ import annotations

from typing import Any

from cometlm.serve.engine import BusyError, StoppedError
from cometlm.serve.kept import FullError, NotKeptError
from cometlm.session.file import NotesError

UNKNOWN = "this field is unknown or not supported; leave it out"
INVALID, SERVER, BUSY = "invalid_request_error", "server_error", "rate_limit_error"


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        param: the field that is wrong, if it is one.
        code: a word for programs.
        retry_after: seconds after which another try is worth it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        said = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": said}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def unsupported(param: str, message: str) -> ApiError:
    """A field, or a value of one, that this server does not do."""
    return ApiError(f"{param}: {message}", param=param, code="unsupported")


def unknown_field(param: str) -> ApiError:
    """A field that nobody here knows."""
    return unsupported(param, UNKNOWN)


def as_api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a client is told of an error; of one that nobody foresaw, only that there was one.

    Args:
        error: any.
        param: the field that a `NotKeptError` is of.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotKeptError):
        code = "dropped" if error.was_given else "not_found"
        return ApiError(str(error), status=404, param=param, code=code)
    if isinstance(error, BusyError):
        if error.retry_after is None:
            return ApiError(str(error), status=503, kind=SERVER, code="stopping")
        return ApiError(
            str(error), status=429, kind=BUSY, code="busy", retry_after=error.retry_after
        )
    if isinstance(error, StoppedError):
        return ApiError(str(error), status=503, kind=SERVER, code="stopping")
    if isinstance(error, NotesError):
        return ApiError(f"nothing was kept: {error.strerror}", status=413, param=param)
    if isinstance(error, FullError):  # no later try is better
        return ApiError(str(error), status=503, kind=SERVER, code="store")
    if isinstance(error, OSError):
        said = "the store cannot be used now; nothing was kept"
        return ApiError(said, status=503, kind=SERVER, code="store", retry_after=30)
    said = "the server failed; its log says why"
    return ApiError(said, status=500, kind=SERVER, code="internal")
