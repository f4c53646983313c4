"""STAC for tests: items, and an API that answers searches."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from tests.test_scene import asset, item_of

NUM_FOUND = 5
NUM_A_PAGE = 2


def item(name: str, *, self_link: str | None = None, href: str = "a.tif", updated: str | None = None) -> dict[str, Any]:
    """An item with one band."""
    fields = item_of({"red": asset(href, "B4=red")}) | {"id": name, "collection": "s2"}
    fields["properties"] |= {"updated": updated} if updated else {}
    fields["links"] = [{"rel": "self", "href": self_link}] if self_link else []
    return fields


def items(*features: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An ItemCollection."""
    return {"type": "FeatureCollection", "features": list(features), **more}


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on this machine, at the address that it yields."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Api(BaseHTTPRequestHandler):
    """A STAC API: five items, two a page; what it was asked is kept."""

    asked: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []
    updated: ClassVar[str] = "2026-11-22T00:00:00Z"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.answer(parts.path, {name: value for name, [value] in parse_qs(parts.query).items()})

    def do_POST(self) -> None:
        self.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, path: str, wanted: dict[str, Any]) -> None:
        root = f"http://{self.headers['Host']}"
        type(self).asked.append((self.command, path, wanted))
        found: dict[str, Any]
        if path == "/":
            links = [{"rel": "search", "href": f"{root}/search"}]
            found = {"type": "Catalog", "stac_version": "1.0.0", "id": "api", "description": "d", "links": links}
        elif path == "/collections/s2":
            links = [{"rel": "items", "href": f"{root}/collections/s2/items"}]
            found = {"type": "Collection", "stac_version": "1.0.0", "id": "s2", "links": links}
        elif path in ("/search", "/collections/s2/items"):
            first = int(wanted.get("token", 0))
            last = 0 if "empty" in str(wanted.get("collections")) else NUM_FOUND
            some = range(first, min(first + NUM_A_PAGE, last))
            following: dict[str, Any] = {"rel": "next", "method": self.command, "href": f"{root}{path}"}
            if self.command == "POST":
                following |= {"body": {"token": first + NUM_A_PAGE}, "merge": True}
            else:
                following["href"] += f"?token={first + NUM_A_PAGE}"
            link = f"{root}/collections/s2/items/"
            found = items(
                *(item(str(index), self_link=f"{link}{index}", updated="2026-11-22T00:00:00Z") for index in some),
                links=[following] if first + NUM_A_PAGE < last else [],
            )
        elif path == "/items/of-today":
            found = item("of-today", updated=type(self).updated)
        else:
            self.send_error(404)
            return
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass
