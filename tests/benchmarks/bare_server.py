"""The engine behind HTTP and nothing else: one process, one route, no check, no queue, no journal.

    python -m tests.benchmarks.bare_server --port 8081

`queue_price.py` starts it to tell what HTTP itself and its client take of the two cores from what
gateway, broker and worker loop take. Whoever kills it loses every stream, which is the difference.
"""

import asyncio
import json
import queue
import signal
import threading
from collections.abc import Callable

import click
import uvloop
from aiohttp import web

from common.messages import Frame
from tests.benchmarks.in_process import InProcessWorker
from worker.engine.sequence import Sequence
from worker.settings import WorkerSettings

PAUSE_S = 0.5  # between looks whether to go on, where there is nothing to do

Tell = Callable[[Frame], None]  # called on the event loop


class EngineThread:
    """Steps while there are sequences; hands every frame to the loop as soon as its step ended."""

    def __init__(self, worker: InProcessWorker, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._loop = loop
        self._arrivals: queue.SimpleQueue[tuple[str, int, Tell]] = queue.SimpleQueue()
        self._tells: dict[Sequence, Tell] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()

    def begin(self, prompt: str, num_tokens: int, tell: Tell) -> None:
        self._arrivals.put((prompt, num_tokens, tell))

    def close(self) -> None:
        self._is_closing = True
        self._thread.join()
        self._worker.close()

    def _run(self) -> None:
        while not self._is_closing:
            self._admit()
            told = []
            for output in self._worker.step():
                told.append((self._tells[output.sequence], output.frame))
                if output.frame.is_terminal:
                    del self._tells[output.sequence]
            if told:
                self._loop.call_soon_threadsafe(_tell_all, told)

    def _admit(self) -> None:
        """All who have come; waits for one when there is nothing else to do."""
        try:
            while True:
                arrival = (
                    self._arrivals.get_nowait()
                    if self._worker.has_work
                    else self._arrivals.get(timeout=PAUSE_S)
                )
                prompt, num_tokens, tell = arrival
                self._tells[self._worker.begin(prompt, num_tokens)] = tell
        except queue.Empty:
            return


def _tell_all(told: list[tuple[Tell, Frame]]) -> None:
    for tell, frame in told:
        tell(frame)


def application(engine: EngineThread) -> web.Application:
    """`POST /generate_stream`, and the two fields of its body that the load generator sends."""

    async def generate_stream(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        frames: asyncio.Queue[Frame] = asyncio.Queue()
        engine.begin(body["inputs"], body["parameters"]["max_new_tokens"], frames.put_nowait)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        index, text = 0, ""
        while True:
            frame = await frames.get()
            for token in frame.tokens:
                index, text = index + 1, text + token.text
                await response.write(_event(index, frame, text))
            if frame.is_terminal:
                return response

    routes = web.Application()
    routes.router.add_post("/generate_stream", generate_stream)
    return routes


def _event(index: int, frame: Frame, text: str) -> bytes:
    (token,) = frame.tokens
    said = {"id": token.id, "text": token.text, "logprob": token.logprob, "special": False}
    is_last = frame.finish is not None
    event = {"index": index, "token": said, "generated_text": text if is_last else None}
    details = {"finish_reason": "length", "generated_tokens": index} if is_last else None
    return b"data: " + json.dumps(event | {"details": details}).encode() + b"\n\n"


@click.command(context_settings={"show_default": True})
@click.option("--port", required=True, type=int)
@click.option("--step-ms", default=5.0, help="Time of one step of the echo model.")
def main(port: int, step_ms: float) -> None:
    """Serve the echo model until it is told to stop."""

    async def run() -> None:
        settings = WorkerSettings(model_id="echo", echo_delay_ms=step_ms)
        engine = EngineThread(InProcessWorker(settings), asyncio.get_running_loop())
        runner = web.AppRunner(application(engine), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        is_over = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_over.set)
        await is_over.wait()
        await runner.cleanup()
        engine.close()

    uvloop.run(run())


if __name__ == "__main__":
    main()
