"""A real browser for tests: headless Chromium, driven over its DevTools protocol."""

import asyncio
import base64
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-extensions"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*"),
)


@dataclass
class Seen:
    """What a page did at one size: what it asked for, what it complained of, what was measured."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    value: object = None


def look(chromium: str, file: Path, views: list[dict], script: str) -> list[Seen]:
    """Open a page at each view and evaluate a script in it.

    Args:
        chromium: The program.
        file: The page.
        views: Each of `width`, `height`, `dark`, and `screenshot`, a file to write, if any.
        script: A JavaScript expression; its value is returned by value.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile, "DevToolsActivePort"), process)
            return asyncio.run(_look(port, file, views, script))
        finally:
            process.terminate()
            process.wait(30)


def _port(file: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and "\n" in file.read_text():
            return int(file.read_text().splitlines()[0])
        time.sleep(0.1)
    raise AssertionError(f"Chromium did not start ({process.poll()})")


async def _look(port: int, file: Path, views: list[dict], script: str) -> list[Seen]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(each for each in await answer.json() if each["type"] == "page")
        async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Network", "Log", "Runtime"):
                await tab.ask(f"{domain}.enable")
            return [await tab.view(file, view, script) for view in views]


class Tab:
    """One tab: asks, and keeps the events that come in between."""

    def __init__(self, socket):
        self.socket, self.asked, self.events = socket, 0, []

    async def ask(self, method: str, **parameters) -> dict:
        self.asked += 1
        await self.socket.send_json({"id": self.asked, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=90)
            if message.get("id") == self.asked:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def view(self, file: Path, view: dict, script: str) -> Seen:
        size = {"width": view["width"], "height": view["height"]}
        await self.ask(
            "Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if view["dark"] else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        await self.ask("Page.navigate", url=file.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(await self.socket.receive_json(timeout=90))
        value = await self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in value, value
        if view.get("screenshot"):
            shot = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
            Path(view["screenshot"]).write_bytes(base64.b64decode(shot["data"]))
        return Seen(
            [e["params"]["request"]["url"] for e in self._of("Network.requestWillBeSent")],
            [
                str(e["params"])
                for name in (
                    "Log.entryAdded",
                    "Runtime.exceptionThrown",
                    "Runtime.consoleAPICalled",
                )
                for e in self._of(name)
            ],
            value["result"].get("value"),
        )

    def _of(self, method: str) -> list[dict]:
        return [event for event in self.events if event["method"] == method]
