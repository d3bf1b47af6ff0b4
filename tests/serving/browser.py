"""Drives a headless Chromium through its DevTools protocol, over a pipe: no port, no package."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Chromium reads commands from file descriptor 3 and writes answers to 4.
_START = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"


class Page:
    """One page of a browser of its own.

    Attributes:
      requests: what the page has asked for, as DevTools describes requests.
      problems: errors and warnings of the console, uncaught exceptions, and what the page's policy refused.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        flags = ["--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-extensions", "--disable-background-networking", "--disable-component-update",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen([sys.executable, "-c", _START, *map(str, ends), CHROMIUM, *flags],
                                         pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in (read, write, *ends):
            os.close(end)
        self._numbers, self._answers, self._rest = itertools.count(1), {}, b""
        self._session: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.problems: list[str] = []
        target = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while number not in self._answers:
            self._receive()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self) -> None:
        block = os.read(self._read, 1 << 16)
        if not block:
            raise RuntimeError("Chromium has ended")
        *messages, self._rest = (self._rest + block).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
                continue
            event, params = message["method"], message["params"]
            if event == "Network.requestWillBeSent":
                self.requests.append(params["request"])
            elif event == "Runtime.exceptionThrown":
                self.problems.append(params["exceptionDetails"]["exception"].get("description", "exception"))
            elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])
            elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.problems.append(str(params["args"]))

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.resize(width, height)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                            {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=False)

    def evaluate(self, script: str) -> Any:
        """Returns the value of a JavaScript expression, a promise's once it has one."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"].get("description", script))
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never true: {condition}; {self.problems}"
            time.sleep(0.03)

    def click(self, selector: str, shift: bool = False) -> None:
        """Clicks the middle of the first element that matches, with the mouse."""
        place = self.evaluate(f"""(() => {{
            const target = document.querySelector({json.dumps(selector)});
            target.scrollIntoView({{block: 'center'}});
            const box = target.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1,
                      modifiers=8 if shift else 0)

    def press(self, key: str, ctrl: bool = False, shift: bool = False) -> None:
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Enter": 13, "Delete": 46,
                " ": 32}.get(key, 0)
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      text="" if ctrl else text, modifiers=2 * ctrl + 8 * shift)

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field holds."""
        self.evaluate(f"(x => {{ x.focus(); x.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def screenshot(self, whole: bool = False) -> bytes:
        """Returns a PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])


@contextlib.contextmanager
def browse(folder: pathlib.Path) -> Iterator[Page]:
    """Yields a page of a new browser that keeps its files in `folder`."""
    page = Page(folder)
    try:
        yield page
    finally:
        page.close()
