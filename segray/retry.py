"""Faults of a store: those that pass are waited for, those that last are raised."""

import errno
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = [
    "CONNECT_SECONDS",
    "PAUSES_SECONDS",
    "READ_SECONDS",
    "S3_SETTINGS",
    "ShortRead",
    "codes",
    "is_refusal",
    "is_transient",
    "retrying",
]

T = TypeVar("T")

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""How long is waited before each further try; a store that answers none of them is taken for lost."""

CONNECT_SECONDS, READ_SECONDS = 10, 30
"""How long S3 may take to begin; what hangs is tried again, here, after less than botocore's minute."""

S3_SETTINGS = {
    "config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"max_attempts": 2}},
    # With more, s3fs asks for each object's size before it asks for the object.
    "max_concurrency": 1,
}
"""What s3fs's file system is made with."""

_TRANSIENT_ERRNOS = {
    *(errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPIPE, errno.EAGAIN, errno.EIO),
    # of mounts and of a machine at its limits
    *(errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ENETDOWN, errno.ENETRESET, errno.EHOSTDOWN),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
# By name, as the clients of stores are not ours to import; those of botocore, aiohttp and fsspec.
_TRANSIENT_NAMES = {
    *("TimeoutError", "ConnectionError", "HTTPClientError", "ConnectTimeoutError", "ReadTimeoutError"),
    *("ResponseParserError", "IncompleteReadError", "ResponseStreamingError", "ClientConnectionError"),
    *("ClientPayloadError", "IncompleteRead", "FSTimeoutError", "gaierror"),
}
_TRANSIENT_CODES = {
    *("SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "RequestTimeTooSkewed"),
    *("500", "502", "503", "504"),
}
_REFUSAL_CODES = {"ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "TokenRefreshRequired"}
_REFUSAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}


class ShortRead(OSError):
    """Fewer bytes came than the store had said there were."""

    def __init__(self, uri: str, num_bytes: int, size_bytes: int) -> None:
        """Takes what came and what should have."""
        super().__init__(errno.EIO, f"{num_bytes} of {size_bytes} bytes came", uri)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the network, a throttle, a server that restarts."""
    return any(
        getattr(cause, "errno", None) in _TRANSIENT_ERRNOS
        or _status(cause) in (408, 429)
        or _status(cause) >= 500
        or _names(cause) & _TRANSIENT_NAMES
        or _code(cause) in _TRANSIENT_CODES
        for cause in _causes(error)
    )


def is_refusal(error: BaseException) -> bool:
    """Whether the store refuses whoever asks, and not the one object: credentials that are wrong or have expired."""
    return any(_names(cause) & _REFUSAL_NAMES or _code(cause) in _REFUSAL_CODES for cause in _causes(error))


def retrying(call: Callable[[], T]) -> T:
    """Calls until it goes well, for about half a minute.

    Raises:
        Exception: the call's own, when it is not transient or was the last.
    """
    for pause in PAUSES_SECONDS:
        try:
            return call()
        except Exception as error:  # whatever the store's client raises
            if not is_transient(error):
                raise
            time.sleep(pause)
    return call()


def codes(error: BaseException) -> set[str]:
    """What an S3 server called the error, for each exception that led to this one."""
    return {_code(cause) for cause in _causes(error)}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else 0


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code")) if isinstance(response, dict) and "Error" in response else ""
