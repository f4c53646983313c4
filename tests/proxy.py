"""A server that hands requests on to another one and writes down what came; a process of its own.

GDAL opens files without giving up Python's lock, so that a thread of the same process could not answer it.
"""

import contextlib
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Proxy:
    """A running one, and what went through it."""

    def __init__(self, port: int, log: Path) -> None:
        """Takes what the attributes hold."""
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    def requests(self) -> list[tuple[str, str, str]]:
        """Since it was last asked: method, path with query, and range (empty where none was given)."""
        text = self._log.read_text()
        self._log.write_text("")
        return [tuple(json.loads(line)) for line in text.splitlines()]


@contextlib.contextmanager
def proxy(host: str, port: int, folder: Path) -> Iterator[Proxy]:
    """Starts one before a server; its log is in a folder."""
    log = folder / "requests.jsonl"
    log.touch()
    command = [sys.executable, __file__, host, str(port), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Proxy(int(process.stdout.readline()), log)
        finally:
            process.kill()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host, port, log = sys.argv[1:]
        with open(log, "a") as file:
            file.write(json.dumps([self.command, self.path, self.headers.get("Range", "")]) + "\n")
        # The Host header stays as it came, since the signature is over it.
        server = http.client.HTTPConnection(host, int(port))
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            server.putheader(name, value)
        server.endheaders()
        answer = server.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
