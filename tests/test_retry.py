import errno
import functools
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from segray import retry
from segray.retry import ShortRead, is_refusal, is_transient, retrying


def client_error(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": ""}}, "GetObject")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.EBUSY, "slow down"),
        ShortRead("s3://b/a.jpg", 3, 5),
        EndpointConnectionError(endpoint_url="http://x"),
        ReadTimeoutError(endpoint_url="http://x"),
        client_error("SlowDown"),
        caused(OSError("wrapped"), client_error("503")),
    ],
)
def test_what_passes_is_transient(error: Exception) -> None:
    assert is_transient(error)
    assert not is_refusal(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        PermissionError("denied"),
        OSError(errno.ENOSPC, "full"),
        ValueError("no image"),
        caused(PermissionError(), client_error("AccessDenied")),
    ],
)
def test_what_lasts_is_not(error: Exception) -> None:
    assert not is_transient(error)
    assert not is_refusal(error)


@pytest.mark.parametrize("error", [NoCredentialsError(), caused(PermissionError(), client_error("ExpiredToken"))])
def test_credentials_that_are_refused_concern_all_objects(error: Exception) -> None:
    assert is_refusal(error)


def failing(times: int, error: Exception, calls: list[int]) -> Callable[[], str]:
    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "well"

    return call


def test_it_is_tried_until_it_goes_well_or_lasts_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES_SECONDS", (0.0, 0.0))
    attempt = functools.partial(failing, error=TimeoutError("slow"))
    calls: list[int] = []
    assert retrying(attempt(2, calls=calls)) == "well"
    assert len(calls) == 3
    with pytest.raises(TimeoutError, match="slow"):
        retrying(attempt(3, calls=[]))


def test_what_lasts_is_raised_at_once() -> None:
    calls: list[int] = []
    with pytest.raises(PermissionError):
        retrying(failing(9, PermissionError(), calls))
    assert len(calls) == 1
