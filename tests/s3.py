"""A real S3 server on this machine, or on a host of it, that can be killed and started again."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import s3fs

START_SECONDS = 60
BUCKET = "segray"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class Server:
    """Runs once it is made, with an empty bucket."""

    def __init__(self, folder: str, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        """Starts it.

        Args:
            folder: an empty one, where it keeps what it is given.
            host: its address.
            prefix: what runs a command on another host.
        """
        self.host, self.port = host, free_port()
        weed = Path(sys.executable).with_name("weed")
        self._command = [
            *(*prefix, str(weed), "mini", f"-dir={folder}", f"-ip={host}", f"-ip.bind={host}"),
            *(f"-s3.port={self.port}", "-admin.ui=false", "-webdav=false", f"-bucket={BUCKET}"),
        ]
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What points s3fs, pyarrow and DuckDB at it."""
        return {
            "AWS_ACCESS_KEY_ID": "segray",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.host}:{self.port}",
        }

    def start(self) -> None:
        """Starts it, and waits until it has its bucket.

        Raises:
            RuntimeError: it does not.
        """
        given = self.environment
        self._process = subprocess.Popen(
            self._command, env=os.environ | given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        fs = s3fs.S3FileSystem(
            key=given["AWS_ACCESS_KEY_ID"],
            secret=given["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=given["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if fs.exists(BUCKET):
                    return
            time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"the S3 server does not start: {' '.join(self._command)}")

    def kill(self) -> None:
        """Ends it without a word."""
        self._process.kill()
        self._process.wait()
