"""Pages in headless Chromium, through its DevTools protocol."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]


class Browser:
    """A browser with one page. `errors` is what the page wrote to its console; `requests` what it asked hosts for."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        port_file = Path(self.profile.name) / "DevToolsActivePort"
        command = [CHROMIUM, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if port_file.exists() and "\n" in (text := port_file.read_text()):
                break
            time.sleep(0.1)
        self.port = int(text.split()[0])
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.connect())
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.session.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()

    async def connect(self) -> None:
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{self.port}/json") as response:
            url = next(page["webSocketDebuggerUrl"] for page in await response.json() if page["type"] == "page")
        self.socket = await self.session.ws_connect(url, max_msg_size=0)
        self.numbers, self.errors, self.requests, self.loaded = itertools.count(), [], [], False
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.notice(message["method"], message["params"])

    def notice(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"]["exception"].get("description", "an exception"))
            case "Runtime.consoleAPICalled":
                self.errors.append(str(params["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Page.loadEventFired":
                self.loaded = True

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        return self.loop.run_until_complete(self.send(method, **params))

    def open(self, page: Path | str, width: int = 1280, *, dark: bool = False) -> None:
        """Open a file or an address."""
        self.errors.clear()
        self.requests.clear()
        self.loaded = False
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.do("Emulation.setEmulatedMedia", features=features)
        self.do("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        for _ in range(300):
            if self.loaded:
                return
            self.do("Runtime.evaluate", expression="new Promise(r => setTimeout(r, 100))", awaitPromise=True)
        raise AssertionError(f"{page} did not load")

    def evaluate(self, expression: str) -> Any:
        result = self.do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def violations(self, axe: Path) -> list[str]:
        """Return what axe-core finds serious or critical, each with its first element."""
        self.evaluate(axe.read_text() + "; 0")
        found = self.evaluate("axe.run().then(result => result.violations)")
        return [
            f"{rule['id']} ({rule['impact']}, {len(rule['nodes'])}): {rule['nodes'][0]['html'][:200]}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]

    def press(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, file: Path) -> None:
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def whole(self, file: Path, most: int = 9000) -> None:
        """Take a screenshot of the whole page, of its first `most` pixels at most."""
        width, height = self.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(most, height), "scale": 1}
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
