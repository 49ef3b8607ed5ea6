"""A small server that speaks ComfyUI's API over real HTTP and a real websocket, on one port.

It draws pictures that depend on the workflow alone, with an error that depends on the model, and
can be told to fail in each way in which the real one does. The websocket's frames are made by hand,
so that the client under test is not checked by its own library.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
GIB = 1 << 30


class FakeComfyUI(ThreadingHTTPServer):
    """`faults` are names of what goes wrong; `error` is by how much pictures of a model differ,
    `seconds` how long a picture takes and `nbytes` what it holds, by the model's name."""

    daemon_threads = True

    def __init__(self, models: list[str], faults: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.faults = models, faults
        self.error = dict.fromkeys(models, 0)
        self.seconds = dict.fromkeys(models, 0.0)
        self.nbytes = dict.fromkeys(models, GIB)
        self.used = 0
        self.freed = 0
        self.prompts: list[dict[str, Any]] = []
        self.history: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.sockets: dict[str, Any] = {}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: clients go away in the middle of tests."""

    def send(self, client: str, kind: str, **data: Any) -> None:
        """A message of the websocket: a text frame, unmasked as servers send them."""
        self.raw(client, 0x81, json.dumps({"type": kind, "data": data}).encode())

    def raw(self, client: str, first: int, payload: bytes) -> None:
        """A frame."""
        length = len(payload)
        head = bytes([first, length]) if length < 126 else struct.pack("!BBH", first, 126, length)
        self.sockets[client].sendall(head + payload)

    def execute(self, identity: str, client: str, workflow: Mapping[str, Any]) -> None:
        """Run a workflow and tell the client, in the order of the real server's messages."""
        begun = int(time.time() * 1000)
        self.send(client, "status", status={"exec_info": {"queue_remaining": 1}})
        self.send(client, "execution_start", prompt_id=identity, timestamp=begun)
        self.send(client, "execution_cached", nodes=[], prompt_id=identity)
        self.raw(client, 0x82, b"\0\0\0\1a preview")
        if "silent" in self.faults:
            return
        if "hangs up" in self.faults:
            self.raw(client, 0x88, struct.pack("!H", 1011))
            return
        node = next(i for i, n in workflow.items() if n["class_type"] == "KSampler")
        other = {"prompt_id": "somebody else's", "node_id": "1", "node_type": "x"}
        self.send(client, "execution_error", exception_message="not ours", **other)
        self.send(client, "executing", node=None, prompt_id=other["prompt_id"])
        self.send(client, "executing", node=node, prompt_id=identity)
        if "node" in self.faults:
            error = {"node_id": node, "node_type": "KSampler", "exception_type": "RuntimeError"}
            told = "mat1 and mat2 shapes cannot be multiplied\n"
            self.send(
                client, "execution_error", prompt_id=identity, exception_message=told, **error
            )
            return
        if "interrupted" in self.faults:
            self.send(client, "execution_interrupted", prompt_id=identity, node_id=node)
            return
        model = workflow["1"]["inputs"]["unet_name"]
        self.used = self.nbytes[model]
        for step in range(2):
            time.sleep(self.seconds[model] / 2)
            data = {"value": step + 1, "max": 2, "prompt_id": identity, "node": node}
            self.send(client, "progress", **data)
        images = self._drawn(identity, workflow, self.error[model])
        self.used = 0
        messages = [
            ["execution_start", {"prompt_id": identity, "timestamp": begun}],
            ["execution_success", {"prompt_id": identity, "timestamp": int(time.time() * 1000)}],
        ]
        outputs = {} if "no pictures" in self.faults else {"9": {"images": images}}
        status = {"status_str": "success", "completed": True, "messages": messages}
        self.history[identity] = {"outputs": outputs, "status": status}
        self.send(client, "executing", node=None, prompt_id=identity)

    def _drawn(
        self, identity: str, workflow: Mapping[str, Any], error: int
    ) -> list[dict[str, str]]:
        latent, sampler = workflow["2"]["inputs"], workflow["3"]["inputs"]
        seed = hashlib.sha256(repr((workflow["4"]["inputs"]["text"], sampler["seed"])).encode())
        rng = np.random.default_rng(int.from_bytes(seed.digest()[:8], "big"))
        images = []
        for index in range(latent["batch_size"]):
            shape = (latent["height"], latent["width"], 3)
            pixels = rng.integers(0, 200, shape).astype("uint8") + np.uint8(error)
            held = io.BytesIO()
            Image.fromarray(pixels).save(held, "PNG")
            name = f"{identity}_{index}.png"
            self.files[name] = held.getvalue()
            images.append({"filename": name, "subfolder": "", "type": "output"})
        return images


class _Handler(BaseHTTPRequestHandler):
    server: FakeComfyUI
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def _answer(self, body: bytes, code: int = 200, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: object, code: int = 200) -> None:
        self._answer(json.dumps(value).encode(), code)

    def do_GET(self) -> None:
        """Everything that asks."""
        url = urllib.parse.urlsplit(self.path)
        words = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        here = self.server
        if "not ComfyUI" in here.faults:
            self._answer(b"<html>hello</html>", kind="text/html")
        elif url.path == "/ws":
            self._socket(words["clientId"])
        elif url.path == "/system_stats":
            device = {"name": "cuda:0 Fake GPU", "vram_total": 24 * GIB}
            device["vram_free"] = 24 * GIB - here.used
            self._json({"system": {}, "devices": [device]})
        elif url.path.startswith("/object_info/"):
            node = urllib.parse.unquote(url.path.rpartition("/")[2])
            inputs = {"unet_name": [here.models]}
            if "new lists" in here.faults:
                inputs = {"unet_name": ["COMBO", {"options": here.models}]}
            self._json({node: {"input": {"required": inputs}}})
        elif url.path.startswith("/history/"):
            identity = url.path.rpartition("/")[2]
            found = here.history.get(identity)
            self._json({} if found is None else {identity: found})
        elif url.path == "/view" and words["filename"] in here.files:
            self._answer(here.files[words["filename"]], kind="image/png")
        else:
            self._json({}, 404)

    def do_POST(self) -> None:
        """Everything that does."""
        here = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/free":
            here.freed += 1
            self._answer(b"")
            return
        if "full" in here.faults:
            self._json({"error": "full"}, 429)
            return
        if "refused" in here.faults:
            error = {"message": "Prompt outputs failed validation", "type": "x", "details": ""}
            wrong = {"message": "Value not in list", "details": "unet_name: 'x' not in []"}
            self._json({"error": error, "node_errors": {"1": {"errors": [wrong]}}}, 400)
            return
        here.prompts.append(body["prompt"])
        identity = f"id-{len(here.prompts)}"
        self._json({"prompt_id": identity, "number": 1, "node_errors": {}})
        arguments = (identity, body["client_id"], body["prompt"])
        threading.Thread(target=here.execute, args=arguments, daemon=True).start()

    def _socket(self, client: str) -> None:
        key = self.headers["Sec-WebSocket-Key"].encode()
        accept = base64.b64encode(hashlib.sha1(key + _MAGIC).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.wfile.flush()
        self.server.sockets[client] = self.connection
        self.close_connection = True
        while self._frame():
            pass

    def _frame(self) -> bool:
        """Read a client's frame; answer a closing one. Whether there will be more."""
        head = self.rfile.read(2)
        if len(head) < 2:
            return False
        length = head[1] & 0x7F
        masked = self.rfile.read(4 + length)
        if head[0] & 0x0F != 8:
            return True
        payload = bytes(b ^ masked[i % 4] for i, b in enumerate(masked[4:]))
        self.connection.sendall(bytes([0x88, len(payload)]) + payload)
        return False


@contextmanager
def comfyui(
    *faults: str, models: tuple[str, ...] = ("base.st", "int8.st")
) -> Iterator[FakeComfyUI]:
    """A server that runs while it lasts."""
    server = FakeComfyUI(list(models), set(faults))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
