"""A headless Chromium that tests talk to over a pipe: the DevTools protocol, without a package for it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)


class Page:
    """One tab; whatever it complains about is in `problems`."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._count, self._rest = 0, b""
        self._session: str | None = None
        self._loaded = False
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Sends one command and waits for its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._notice(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read.fileno(), 2**20)
            assert more, "the browser went away"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def _notice(self, event: dict[str, Any]) -> None:
        name, what = event.get("method"), event.get("params", {})
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(what["exceptionDetails"])[:400])
        elif name == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(what["args"])[:400])
        elif name == "Log.entryAdded":
            self.problems.append(what["entry"]["text"][:400])
        elif name == "Network.requestWillBeSent" and not what["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"asks for {what['request']['url'][:200]}")

    def open(self, file: Path, width: int = 1280, *, dark: bool = False, still: bool = True) -> None:
        """Shows a file at a width, in a theme, with or without motion."""
        self.show(width=width, dark=dark, still=still)
        self._loaded = False
        self.call("Page.navigate", url=file.as_uri())
        while not self._loaded:
            self._notice(self._next())

    def show(self, *, width: int = 1280, dark: bool = False, still: bool = True, media: str = "") -> None:
        """Another width, theme or medium for the page that is open."""
        height = 844 if width < 700 else 900
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": name, "value": value} for name, value in features.items()],
        )

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression, or of what a function body returns."""
        body = code if "return " in code or code.endswith(";") else f"return ({code});"
        found = self.call("Runtime.evaluate", expression=f"(() => {{ {body} }})()", returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(json.dumps(found["exceptionDetails"])[:600])
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Presses keys as a hand does: `Tab`, `ArrowRight`, `Home`."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes.get(key, 0)
                )

    def point(self, x: float, y: float) -> None:
        """Moves the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def shoot(self, path: Path, clip: Sequence[float] | None = None, scale: float = 1) -> None:
        """A PNG of the whole page, or of a part (x, y, width, height)."""
        more: dict[str, Any] = {}
        if clip is not None:
            more["clip"] = {**dict(zip(("x", "y", "width", "height"), clip, strict=True)), "scale": scale}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, **more)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """The page as a PDF."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))

    def close(self) -> None:
        """Lets go of the pipes."""
        self._write.close()
        self._read.close()


@contextmanager
def browser(user: Path) -> Iterator[Page]:
    """A tab of a browser that keeps its things in `user` and ends with the block."""
    assert CHROMIUM is not None
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()

    def at_three_and_four() -> None:
        low, high = os.dup(theirs_in), os.dup(theirs_out)  # neither may be 3 or 4 yet
        first, second = max(low, 10), max(high, 11)
        os.dup2(low, first)
        os.dup2(high, second)
        os.dup2(first, 3)
        os.dup2(second, 4)

    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={user}"],
        stderr=subprocess.DEVNULL,
        preexec_fn=at_three_and_four,
        pass_fds=(3, 4),
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = None
    try:
        page = Page(ours_in, ours_out)
        yield page
    finally:
        if page is not None:
            page.close()
        process.terminate()
        process.wait(30)
