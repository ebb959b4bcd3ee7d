"""A model hub on this machine: as much of its HTTP as huggingface_hub needs for a commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "sEcReT" * 6


class Hub:
    """`repos`: name -> path -> bytes. Everything but a log-in is refused with another token than `TOKEN`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.private: dict[str, bool] = {}
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self, content: Any, code: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub._large[hashlib.sha256(body).hexdigest()] = body
                self._answer({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer({"error": "Invalid username or password."}, 401)
                else:
                    self._answer(hub.post(self.path, body))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repos.setdefault(name, {})
            self.private[name] = asked.get("private", False) or asked.get("visibility") == "private"
            return {"url": f"{self.address}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            large = [f["path"].endswith(".safetensors") for f in files]
            return {"files": [{"path": f["path"], "uploadMode": "lfs" if big else "regular", "shouldIgnore": False,
                               "oid": None} for f, big in zip(files, large, strict=True)]}  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}", "header": {}}}} for o in objects
            ]}  # fmt: skip
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.repos[name][value["path"]] = self._large[value["oid"]]
            else:
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
        return {"commitUrl": f"{self.address}/{name}/commit/{len(self.messages)}", "commitOid": "0" * 40,
                "pullRequestUrl": None}  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()
