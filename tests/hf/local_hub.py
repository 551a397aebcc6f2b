"""What a hub does when a model is pushed to it, on this machine: what is committed lies in a folder."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """Gives the address of a hub; the files of repository NAME appear in folder/NAME."""

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
            if not body and self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(self._chunks())
            path = self.path.partition("?")[0].strip("/")
            if path == "api/repos/create":
                asked = json.loads(body)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                self._answer({"url": f"{address}/{name}", "name": name, "id": name})
            elif "/preupload/" in path:
                asked_files = json.loads(body)["files"]
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                self._answer({"files": [{"path": file["path"], **plain} for file in asked_files]})
            elif "/commit/" in path:
                repository = path.removeprefix("api/models/").partition("/commit/")[0]
                self._commit(folder / repository, body)
                self._answer({"commitUrl": f"{address}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})
            else:
                self._answer({})

        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def _commit(self, repository: Path, body: bytes) -> None:
            for operation in map(json.loads, body.splitlines()):
                if operation["key"] == "file":
                    file = repository / operation["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(operation["value"]["content"]))

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()

        def _answer(self, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
