"""Pages opened in a real Chromium: what it logged, what it fetched, and pictures of them.

It is the one inside PyQt6-WebEngine, which PyPI has (`pip install -e '.[browser]'`), without a
screen. One process, which takes a second to start, opens any number of pages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

_SECONDS = 90
_NO_BROWSER = 3  # the process's exit code
_HEIGHT = 1000


@dataclass(frozen=True)
class Visit:
    """A page, how wide the window is, whether the reader prefers dark pages, and the body of an
    asynchronous function that is run in it. `picture` is where a PNG of the whole page goes,
    `printed` a PDF."""

    page: str
    script: str = ""
    width: int = 1200
    dark: bool = False
    picture: str = ""
    printed: str = ""


@dataclass(frozen=True)
class Opened:
    """How a page looks to a browser: lines of its console, addresses that it asked for, the text
    that it shows, and what the script gave."""

    console: list[str]
    fetched: list[str]
    text: str
    result: Any


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    try:
        found = importlib.util.find_spec("PyQt6.QtWebEngineWidgets")
    except ModuleNotFoundError:
        found = None
    return None if found else "PyQt6-WebEngine, which holds a Chromium, is not installed"


def open_pages(visits: Sequence[Visit]) -> list[Opened]:
    """Make the visits, one after another, in one process for light pages and one for dark ones. The
    test is skipped where there is no browser, and where a shared library that it needs is not
    there."""
    reason = missing()
    if reason is not None:
        _skip(reason)
    found: dict[int, Opened] = {}
    for dark in (False, True):
        places = [i for i, visit in enumerate(visits) if visit.dark is dark]
        opened = _process([visits[i] for i in places], dark=dark) if places else []
        found.update(zip(places, opened, strict=True))
    return [found[i] for i in range(len(visits))]


def _skip(reason: str) -> NoReturn:
    import pytest  # not in the browser's process, which shares this file

    pytest.skip(reason)


def _process(visits: Sequence[Visit], *, dark: bool) -> list[Opened]:
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([asdict(visit) for visit in visits]).encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            env={
                **os.environ,
                "HOME": home,
                "QT_QPA_PLATFORM": "offscreen",
                "QTWEBENGINE_DISABLE_SANDBOX": "1",
                "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu --blink-settings="
                f"preferredColorScheme={0 if dark else 1}",
            },
        )
    if done.returncode == _NO_BROWSER:
        _skip(f"the browser does not start: {done.stdout.decode().strip()}")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return [Opened(**one) for one in json.loads(done.stdout.decode().strip().split("\n")[-1])]


# The process -------------------------------------------------------------------------------------

_RUN = """(async () => {{ {script} }})().then(
    result => {{ window.cqSeen = JSON.stringify([result ?? null]) }},
    error => {{ window.cqSeen = JSON.stringify(["failed: " + error]) }})"""


def _main() -> None:
    try:
        from PyQt6.QtCore import QCoreApplication, Qt, QTimer, QUrl
        from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
        from PyQt6.QtWebEngineWidgets import QWebEngineView
        from PyQt6.QtWidgets import QApplication
    except ImportError as error:
        print(error)  # noqa: T201
        sys.exit(_NO_BROWSER)

    console: list[str] = []
    fetched: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: N802
            console.append(f"{message} (line {line})")

    class Watch(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):  # noqa: N802
            fetched.append(info.requestUrl().toString()[:200])

    QCoreApplication.setAttribute(Qt.ApplicationAttribute.AA_ShareOpenGLContexts)
    app = QApplication(["cq"])
    view = QWebEngineView()
    page, watch = Page(view), Watch()
    page.profile().setUrlRequestInterceptor(watch)
    view.setPage(page)

    def waited(milliseconds: int) -> Iterator[Any]:
        yield lambda go_on: QTimer.singleShot(milliseconds, lambda: go_on(None))

    def visits() -> Iterator[Any]:
        """Gives what to wait for: a function that calls back. What that is given comes back."""
        seen = []
        for visit in (Visit(**one) for one in json.load(sys.stdin)):
            console.clear()
            fetched.clear()
            view.resize(visit.width, _HEIGHT)
            view.show()
            well = yield lambda go_on, visit=visit: _once(
                page.loadFinished, go_on, lambda: view.load(QUrl.fromLocalFile(visit.page))
            )
            assert well, visit.page
            yield from waited(100)
            result = None
            if visit.script:
                yield lambda go_on, visit=visit: page.runJavaScript(
                    _RUN.format(script=visit.script), go_on
                )
                told = None
                while not told:
                    told = yield lambda go_on: page.runJavaScript("window.cqSeen || ''", go_on)
                (result,) = json.loads(told)
            text = yield page.toPlainText
            if visit.printed:
                yield lambda go_on, visit=visit: _once(
                    page.pdfPrintingFinished, go_on, lambda: page.printToPdf(visit.printed)
                )
            if visit.picture:
                height = yield lambda go_on: page.runJavaScript(
                    "document.documentElement.scrollHeight", go_on
                )
                view.resize(visit.width, min(int(height), 8000))
                yield from waited(900)
                view.grab().save(visit.picture)
            seen.append(asdict(Opened([*console], [*fetched], text, result)))
        sys.stdout.write(json.dumps(seen))
        sys.stdout.flush()
        os._exit(0)  # Qt's own end takes seconds

    steps = visits()

    def go_on(value: Any) -> None:
        # Not from within the callback, which Chromium may call at once.
        QTimer.singleShot(0, lambda: steps.send(value)(go_on))

    next(steps)(go_on)
    app.exec()


def _once(signal: Any, go_on: Any, start: Any) -> None:
    """Start what ends with a signal, and go on with the last thing that it says."""

    def ended(*said: Any) -> None:
        signal.disconnect(ended)
        go_on(said[-1])

    signal.connect(ended)
    start()


if __name__ == "__main__":
    _main()
