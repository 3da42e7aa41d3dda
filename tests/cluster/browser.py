"""A headless Chromium that is cut off from every network, driven through a pair of pipes.

    with Browser(tmp_path) as browser:
        browser.open(page, width=1200)
        browser.evaluate("document.title")
        browser.screenshot(tmp_path / "page.png")

It runs in a network namespace of its own, which has no interface, and resolves no name. What a page asked for, and what
went wrong in it, is kept.
"""

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from programs import need_programs, stop

# A POSIX shell need not know files beyond the ninth.
_PACKAGES = {"chromium": "chromium", "unshare": "util-linux", "bash": "bash"}
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
_SECONDS = 60.0


class Browser:
    """One page in one browser.

    Attributes:
        asked_for: addresses that the page asked for.
        errors: what went wrong in it: exceptions of its script, and what the browser's log holds of errors.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number, self._read = 0, b""
        self._session = ""
        self.asked_for: list[str] = []
        self.errors: list[str] = []

    def __enter__(self) -> "Browser":
        found = need_programs(_PACKAGES)
        # The browser reads commands from file 3 and answers on file 4.
        (reads, self._to), (self._from, writes) = os.pipe(), os.pipe()
        self._log = open(self._directory / "chromium.log", "w")
        browser = [found["chromium"], *_OPTIONS, f"--user-data-dir={self._directory / 'chromium'}", "about:blank"]
        self._process = subprocess.Popen(
            [found["unshare"], "--net", found["bash"], "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *browser],
            pass_fds=(reads, writes),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(reads)
        os.close(writes)
        try:
            self._attach()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        # It ends when its pipe does.
        os.close(self._to)
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
        self._log.close()

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Open a file in a window of some width, as high as the page is."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])
        self._resize(width, 900)
        self._command("Page.navigate", url=page.as_uri())
        until = time.monotonic() + _SECONDS
        while self.evaluate("document.readyState + location.href") != f"complete{page.as_uri()}":
            if time.monotonic() > until:
                stop(f"Chromium has not opened {page} in {_SECONDS:.0f} s")
            time.sleep(0.02)
        self._resize(width, int(self.evaluate("document.documentElement.scrollHeight")))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = self._command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """Paint the whole page into a PNG file."""
        found = self._command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def _attach(self) -> None:
        targets = self._command("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._command("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._command(f"{domain}.enable")

    def _resize(self, width: int, height: int) -> None:
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def _command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self._note(said)

    def _next(self) -> dict[str, Any]:
        """The next message: JSON that ends with a zero byte."""
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], _SECONDS)
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                said = (self._directory / "chromium.log").read_text().strip().splitlines()
                stop(f"Chromium does not answer: {said[-1] if said else 'it says nothing'}")
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        what, told = event.get("method"), event.get("params", {})
        if what == "Network.requestWillBeSent":
            self.asked_for.append(told["request"]["url"])
        elif what == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"]))
        elif what == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
