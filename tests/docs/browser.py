"""A headless Chromium that does what it is told over the DevTools protocol, and keeps what it asked for and complained of."""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.environments import CACHE, locked, python_with

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HERE = Path(__file__).parent
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # containers have none of what it needs
    "--no-zygote",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    # there is no network: only this machine has a name
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def find_chromium() -> tuple[str, dict[str, str]]:
    """A program and its environment: the machine's own, or one that is fetched into .cache once."""
    for name in PROGRAMS:
        if path := shutil.which(name):
            return path, {}
    folder = CACHE / "chromium"
    with locked(folder):
        if not folder.exists():
            python = python_with(HERE / "chromium.txt")
            subprocess.run([python, HERE / "fetch_chromium.py", folder], check=True)
    environment = {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_PATH": str(folder)}
    return str(folder / "chromium"), environment


class Page:
    """One tab. `asked` are the addresses it requested, `complaints` its errors and warnings."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self._socket = socket
        self._session = ""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()

    async def begin(self, width: int, height: int) -> None:
        """Open the tab; `listen` must run."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", flatten=True, **target)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)

    async def listen(self) -> None:
        """Take in answers and events until the browser goes."""
        async for message in self._socket:
            data = json.loads(message.data)
            if waiting := self._waiting.pop(data.get("id"), None):
                waiting.set_result(data)
            else:
                self._note(data.get("method", ""), data.get("params", {}))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. AssertionError when the browser refuses it."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(
            message | ({"sessionId": self._session} if self._session else {})
        )
        data = await answer
        assert "error" not in data, data
        return data["result"]

    async def open(self, url: str) -> None:
        """Go there and wait until the page and its scripts are loaded."""
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await self._loaded.wait()

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited. AssertionError with what it throws."""
        result = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, script: str) -> Any:
        """The value of an expression once it is true."""
        while not (value := await self.run(script)):
            await asyncio.sleep(0.02)  # what the page draws is announced by nothing
        return value

    async def screenshot(self, path: Path) -> None:
        data = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(data["data"]))

    def _note(self, method: str, data: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Network.requestWillBeSent":
            self.asked.append(data["request"]["url"])
        elif method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{data['entry']['text']} {data['entry'].get('url', '')}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(data["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(data["args"]))


@asynccontextmanager
async def open_page(folder: Path, *, width: int = 1280, height: int = 900) -> AsyncIterator[Page]:
    """A browser with its files in `folder`, and a tab in it."""
    program, environment = find_chromium()
    process = await asyncio.create_subprocess_exec(
        program,
        *_OPTIONS,
        f"--user-data-dir={folder}",
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        address = await _address(process)
        draining = asyncio.create_task(process.stderr.read())
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as socket,
        ):
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            await page.begin(width, height)
            yield page
            listening.cancel()
        process.terminate()
        await draining
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    log = b""
    async for line in process.stderr:
        log += line
        if match := re.search(rb"DevTools listening on (ws://\S+)", line):
            return match[1].decode()
    raise AssertionError(f"the browser ended: {log.decode(errors='replace')}")
