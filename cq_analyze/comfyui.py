"""A running ComfyUI: its HTTP API and its websocket, as `cq verify --comfyui` needs them.

Owns the conversation: queueing a workflow, waiting for its end, the pictures it made, how long it
took and how much memory it used. Whatever goes wrong is one error that names the address. The
websocket client comes with `cq[comfyui]`.

Source: ComfyUI `server.py` (`/prompt`, `/history/{id}`, `/view`, `/system_stats`, `/object_info`,
`/free`, `/ws`) and `execution.py` (the messages of the websocket).
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cq.core.errors import CqError, PlanError, ResourceError, UsageError
from cq.core.text import printable
from cq_analyze.report import natural

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 30.0
_HISTORY_SECONDS = 10.0
_LARGEST_MESSAGE = 64 << 20  # previews come over the websocket, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a workflow: its pictures, the seconds from its start to its end, and the most
    memory that the device had in use while it lasted (None if the server does not tell)."""

    pictures: tuple[bytes, ...]
    seconds: float
    nbytes_peak: int | None


class Server:
    """A ComfyUI server at `url`. `timeout` is the longest that a single run may take.

    Units: seconds.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise UsageError(
                f"`{printable(url)}` is not the address of a server",
                hint="write one such as `http://127.0.0.1:8188`",
            )
        if find_spec("websockets") is None:
            raise ResourceError(
                "talking to ComfyUI needs the package `websockets`, which is not installed",
                hint="install it: `pip install websockets`",
                code="resource.package",
            )
        self._url = url.rstrip("/")
        self.shown = printable(self._url)
        self._timeout = timeout
        self._client = uuid.uuid4().hex

    def device(self) -> str:
        """What the server runs on, in words. Raises: ResourceError if it cannot be reached."""
        devices = self._json("/system_stats").get("devices") or [{}]
        return printable(str(devices[0].get("name", "unknown")))

    def models(self, node: str, name: str) -> list[str] | None:
        """The names that a node's input may have, None if the server does not list them."""
        found = self._json(f"/object_info/{urllib.parse.quote(node, safe='')}")
        try:
            kind, *options = found[node]["input"]["required"][name]
        except (KeyError, TypeError, ValueError):
            return None
        if isinstance(kind, list):
            return [str(value) for value in kind]
        listed = options[0].get("options") if options and isinstance(options[0], dict) else None
        return [str(value) for value in listed] if isinstance(listed, list) else None

    def free(self) -> None:
        """Ask the server to unload its models, so that the next run is not helped by the last."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    def run(self, workflow: Mapping[str, Any]) -> Run:
        """Run a workflow to its end.

        Raises: PlanError for a workflow that the server refuses or fails in; ResourceError for a
        server that is gone, full, or slower than the timeout.
        """
        with self._listening() as socket:
            queued = json.loads(
                self._post("/prompt", {"prompt": workflow, "client_id": self._client})
            )
            try:
                identity = str(queued["prompt_id"])
            except (KeyError, TypeError) as error:
                raise self._odd("/prompt") from error
            seconds, peak = self._wait(socket, identity)
        entry = self._history(identity)
        return Run(
            pictures=tuple(self._pictures(entry)),
            seconds=_duration(entry) or seconds,
            nbytes_peak=peak,
        )

    @contextmanager
    def _listening(self) -> Iterator[ClientConnection]:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        address = "ws" + self._url.removeprefix("http") + f"/ws?clientId={self._client}"
        try:
            with connect(
                address,
                open_timeout=_ANSWER_SECONDS,
                max_size=_LARGEST_MESSAGE,
                proxy=None,
                compression=None,
                ping_interval=None,  # a server that loads a model may not answer for minutes
            ) as socket:
                yield socket
        except (OSError, WebSocketException) as error:
            raise self._lost(error) from error

    def _wait(self, socket: ClientConnection, identity: str) -> tuple[float, int | None]:
        """Listen until the run has ended; its seconds and its peak memory."""
        begun = time.monotonic()
        deadline = begun + self._timeout
        peak = self._used()
        looked = time.monotonic()
        while True:
            try:
                message = socket.recv(timeout=_POLL_SECONDS)
            except TimeoutError:
                message = b""
            now = time.monotonic()
            if now - looked >= _POLL_SECONDS:
                peak = max((x for x in (peak, self._used()) if x is not None), default=None)
                looked = time.monotonic()
            if now > deadline:
                raise ResourceError(
                    f"`{self.shown}` did not finish a run in {self._timeout:g} s",
                    hint="raise `--timeout`, or see whether other work waits in its queue",
                    code="resource.comfyui",
                )
            event = _event(message, identity)
            if event == "execution_start":
                begun = now
            elif event == "done":
                used = self._used()
                return now - begun, max((x for x in (peak, used) if x is not None), default=None)

    def _used(self) -> int | None:
        """Bytes in use on the first device."""
        try:
            device = self._json("/system_stats")["devices"][0]
            return int(device["vram_total"]) - int(device["vram_free"])
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def _history(self, identity: str) -> Mapping[str, Any]:
        deadline = time.monotonic() + _HISTORY_SECONDS
        while time.monotonic() < deadline:
            entry = self._json(f"/history/{urllib.parse.quote(identity, safe='')}").get(identity)
            if isinstance(entry, dict):
                return entry
            time.sleep(_POLL_SECONDS)
        raise self._odd(f"/history/{printable(identity)}")

    def _pictures(self, entry: Mapping[str, Any]) -> Iterator[bytes]:
        """The saved pictures, else those that were only shown, in the order of nodes."""
        outputs = entry.get("outputs")
        nodes = outputs if isinstance(outputs, dict) else {}
        found = [
            image
            for node in sorted(nodes, key=natural)
            for image in nodes[node].get("images") or ()
            if isinstance(image, dict) and "filename" in image
        ]
        saved = [image for image in found if image.get("type") == "output"]
        if not found:
            raise PlanError(
                "the workflow made no picture",
                hint="it needs a node such as `SaveImage` at its end",
                code="plan.workflow",
            )
        for image in saved or found:
            words = {key: str(image.get(key, "")) for key in ("filename", "subfolder", "type")}
            yield self._ask("/view?" + urllib.parse.urlencode(words))

    def _json(self, path: str) -> dict[str, Any]:
        try:
            found = json.loads(self._ask(path))
        except ValueError as error:
            raise self._odd(path) from error
        if not isinstance(found, dict):
            raise self._odd(path)
        return found

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            self._url + path, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            # No proxy: the server is on this machine or beside it.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from error
        except (OSError, ValueError) as error:
            raise self._lost(error) from error

    def _refused(self, path: str, error: urllib.error.HTTPError) -> CqError:
        if error.code in {429, 503}:
            return ResourceError(
                f"`{self.shown}` takes no more work: its queue is full",
                hint="try again when it is done with what it has",
                code="resource.comfyui",
            )
        if path == "/prompt" and error.code == 400:
            return PlanError(
                f"ComfyUI refuses the workflow: {_why(error.read())}",
                hint="see that the server has its nodes and models",
                code="plan.workflow",
            )
        told = f"{error.code} {printable(str(error.reason))}"
        return ResourceError(
            f"`{self.shown}{printable(path)}` answers {told}",
            hint="is this the address of a ComfyUI?",
            code="resource.comfyui",
        )

    def _lost(self, error: Exception) -> ResourceError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        told = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return ResourceError(
            f"cannot talk to ComfyUI at `{self.shown}`: {printable(str(told)).lower()}",
            hint="is it running there?",
            code="resource.comfyui",
        )

    def _odd(self, path: str) -> ResourceError:
        return ResourceError(
            f"`{self.shown}{printable(path)}` answers something else than ComfyUI does",
            hint="is this the address of a ComfyUI?",
            code="resource.comfyui",
        )


def _event(message: str | bytes, identity: str) -> str | None:
    """What a message says of our run. Raises: PlanError if it failed; ResourceError if somebody
    stopped it."""
    if isinstance(message, bytes):
        return None  # a preview
    try:
        found = json.loads(message)
        kind, data = found["type"], found["data"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(data, dict) or data.get("prompt_id") != identity:
        return None
    if kind == "execution_error":
        node = f"`{data.get('node_id')}` ({data.get('node_type')})"
        told = f"{data.get('exception_type', 'error')}: {data.get('exception_message', '')}"
        raise PlanError(
            f"the workflow failed in its node {printable(node)}: {printable(told.strip(), 300)}",
            hint="run it in ComfyUI with the same model to see more",
            code="plan.workflow",
        )
    if kind == "execution_interrupted":
        raise ResourceError("the run was interrupted in ComfyUI", code="resource.comfyui")
    ended = kind == "execution_success" or (kind == "executing" and data.get("node") is None)
    return "done" if ended else str(kind)


def _why(body: bytes) -> str:
    """The reasons in an answer to `/prompt`."""
    try:
        answer = json.loads(body)
        told = [str(answer["error"]["message"])]
        for node, found in (answer.get("node_errors") or {}).items():
            for error in found["errors"]:
                told.append(f"node `{node}`: {error['message']}: {error.get('details', '')}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "it does not say why"
    return printable("; ".join(told), 400)


def _duration(entry: Mapping[str, Any]) -> float | None:
    """Seconds from start to end by the server's own clock."""
    try:
        times = {kind: data["timestamp"] for kind, data in entry["status"]["messages"]}
        return max(0.0, float(times["execution_success"] - times["execution_start"]) / 1000)
    except (KeyError, TypeError, ValueError):
        return None
