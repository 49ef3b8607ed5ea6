"""A page opened in a real Chromium: what it logged, what it fetched, and a picture of it.

It is the one inside PyQt6-WebEngine, which PyPI has (`pip install -e '.[browser]'`), without a
screen and in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 60


@dataclass(frozen=True)
class Opened:
    """How a page looks to a browser: lines of its console, addresses that it asked for, the text
    that it shows, and what the script gave."""

    console: list[str]
    fetched: list[str]
    text: str
    result: str


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    try:
        found = importlib.util.find_spec("PyQt6.QtWebEngineWidgets")
    except ModuleNotFoundError:
        found = None
    return None if found else "PyQt6-WebEngine, which holds a Chromium, is not installed"


def open_page(page: Path, script: str = "", picture: Path | None = None) -> Opened:
    """Load `page`, run `script` in it, and look. `picture` is where a PNG of it goes."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, __file__, str(page), script, str(picture or "")],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            env={
                **os.environ,
                "HOME": home,
                "QT_QPA_PLATFORM": "offscreen",
                "QTWEBENGINE_DISABLE_SANDBOX": "1",
                "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu",
            },
        )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return Opened(**json.loads(done.stdout.decode().strip().split("\n")[-1]))


def _main(page: str, script: str, picture: str) -> None:
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    seen: dict[str, object] = {"console": [], "fetched": [], "result": ""}

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: N802
            seen["console"].append(f"{message} (line {line})")

    class Watch(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):  # noqa: N802
            seen["fetched"].append(info.requestUrl().toString()[:200])

    app = QApplication(["cq"])
    view = QWebEngineView()
    shown, watch = Page(view), Watch()
    shown.profile().setUrlRequestInterceptor(watch)
    view.setPage(shown)
    view.resize(1280, 2200)
    view.show()

    def end(text: str) -> None:
        if picture:
            view.grab().save(picture)
        sys.stdout.write(json.dumps({**seen, "text": text}))
        sys.stdout.flush()
        os._exit(0)  # Qt's own end takes seconds

    def look(result: object) -> None:
        seen["result"] = str(result)
        QTimer.singleShot(700, lambda: shown.toPlainText(end))

    def loaded(well: bool) -> None:
        if not well:
            os._exit(3)
        shown.runJavaScript(script or "''", look)

    shown.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    app.exec()


if __name__ == "__main__":
    _main(*sys.argv[1:])
