"""A gateway on a fleet in memory: no Redis, no worker. `fleet` says what is generated, `client` speaks HTTP."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp.test_utils import TestClient, TestServer
from opentelemetry.trace import NoOpTracer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.messages import (
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    ModelCard,
    Token,
    first_chain,
    next_chain,
)
from common.request_queue import QueueDepth
from common.worker_registry import WorkerStatus
from gateway.admission import Admission
from gateway.app import create_app
from gateway.broker_health import BrokerHealth
from gateway.exposition import SharedMetrics
from gateway.generation import Generator
from gateway.key_limits import KeyLimits
from gateway.metrics import GatewayMetrics
from gateway.model_directory import ModelDirectory
from gateway.request_finder import RequestFinder
from gateway.services import Services
from gateway.settings import GatewaySettings
from gateway.tokenization import TokenizerCache
from gateway.watching import Watches
from tests.openai_calls import TEMPLATE


def byte_tokenizer() -> bytes:
    """A tokenizer.json with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


CARD = ModelCard(
    model="tiny",
    max_input_tokens=20,
    max_total_tokens=30,
    vocab_size=256,
    tokenizer_digest="bytes",
    architecture="TinyForCausalLM",
    device="cpu",
)
READY = WorkerStatus("worker-1", "tiny", slots=4, running=1, kv_used=0.25)


def frames_of(
    request_id: str,
    words: list[str],
    *,
    reason: FinishReason = FinishReason.LENGTH,
    logprob: float = -0.5,
) -> list[Frame]:
    """One frame a word, the last with the finish."""
    frames, chain = [], first_chain(request_id)
    for number, word in enumerate(words):
        tokens = (Token(10 + number, word, logprob),)
        chain = next_chain(chain, tokens)
        is_last = number == len(words) - 1
        finish = Finish(reason, len(words), 0.25, 0.5, 1.0) if is_last else None
        frames.append(Frame(tokens=tokens, chain=chain, finish=finish))
    return frames


class FakeRegistry:
    def __init__(self) -> None:
        self.cards = {CARD.model: CARD}
        self.tokenizers = {"bytes": byte_tokenizer()}
        self.statuses = [READY]
        self.error: Exception | None = None

    async def models(self) -> list[str]:
        if self.error:
            raise self.error
        return sorted(self.cards)

    async def card(self, model: str) -> ModelCard | None:
        return self.cards[model]

    async def tokenizer(self, model: str, digest: str) -> bytes | None:
        return self.tokenizers.get(digest)

    async def workers(self, model: str) -> list[WorkerStatus]:
        return [replace(status, model=model) for status in self.statuses]


class FakeFleet:
    """Queue, journal and workers of one model. Set `answer` to choose the frames, or None to hold requests."""

    def __init__(self) -> None:
        self.registry = FakeRegistry()
        self.requests: list[GenerationRequest] = []
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.enqueued: asyncio.Queue[GenerationRequest] = asyncio.Queue()
        self.error: Exception | None = None
        self.cancel_error: Exception | None = None
        self.answer: Callable[[GenerationRequest], list[Frame]] | None = lambda request: frames_of(
            request.id, [" one", " two"]
        )
        self._journals: dict[str, asyncio.Queue] = {}

    async def enqueue(self, request: GenerationRequest, *, max_waiting: int, watcher: str) -> bool:
        if self.error:
            raise self.error
        self.requests.append(request)
        self.enqueued.put_nowait(request)
        if self.answer:
            self.push(request.id, *self.answer(request))
        return True

    async def cancel(self, request_id: str) -> bool:
        self.cancelled.put_nowait(request_id)
        if self.cancel_error:
            raise self.cancel_error
        return True

    async def find(self, request_id: str) -> GenerationRequest | None:
        return next((known for known in self.requests if known.id == request_id), None)

    async def unwatch(self, request_id: str, watcher: str) -> int:
        return 0

    async def depth(self) -> QueueDepth:
        return QueueDepth(waiting=3, running=1)

    def push(self, request_id: str, *items: Frame | Exception) -> None:
        for item in items:
            self._journals[request_id].put_nowait(item)

    @asynccontextmanager
    async def open(
        self, request_id: str, *, expects=None, restore=None
    ) -> AsyncIterator["FakeReader"]:
        self._journals[request_id] = asyncio.Queue()
        yield FakeReader(self._journals[request_id])
        del self._journals[request_id]


class FakeReader:
    def __init__(self, frames: asyncio.Queue) -> None:
        self._frames = frames
        self._index = -1
        self._held: list[Frame | Exception] = []  # for the iteration to tell

    def listen(self, sink: Callable[[], None]) -> None:
        """Never calls it: what is pushed wakes the iteration. tests/integration has the real reader."""

    def nothing_missed(self) -> None:
        pass

    def take_ready(self) -> list[tuple[int, Frame]]:
        ready = []
        while not (self._held or self._frames.empty()):
            item = self._frames.get_nowait()
            if isinstance(item, Exception) or item.failure is not None:
                self._held.append(item)
            else:
                self._index += 1
                ready.append((self._index, item))
        return ready

    async def __anext__(self) -> tuple[int, Frame]:
        item = self._held.pop() if self._held else await self._frames.get()
        if isinstance(item, Exception):
            raise item
        self._index += 1
        return self._index, item


MakeClient = Callable[..., Awaitable[TestClient]]


@pytest.fixture(name="frames_of")
def frames_of_fixture() -> Callable[..., list[Frame]]:
    return frames_of


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def chat_model(fleet: FakeFleet) -> None:
    """The model has a chat template, an end of sequence, and room for conversations."""
    fleet.registry.cards[CARD.model] = replace(
        CARD, max_input_tokens=400, max_total_tokens=500, chat_template=TEMPLATE, eos_tokens=(255,)
    )


@pytest.fixture
async def make_client(fleet: FakeFleet) -> AsyncIterator[MakeClient]:
    """Starts a gateway with the given settings; `client.services` are its collaborators."""
    clients: list[TestClient] = []

    async def make(*, tracer=None, **values) -> TestClient:
        settings = GatewaySettings(**values)
        opened: list[Services] = []

        @asynccontextmanager
        async def open_services(settings: GatewaySettings) -> AsyncIterator[Services]:
            metrics = GatewayMetrics()
            tokenizers = TokenizerCache(num_threads=1)
            directory = ModelDirectory(
                fleet.registry, tokenizers, lambda model: fleet, default_model=settings.model_id
            )
            await directory.refresh()
            generator = Generator(
                open_queue=lambda model: fleet,
                open_journal=lambda model: fleet,
                open_store=lambda model: fleet,
                watches=Watches(lambda model: fleet),
                metrics=metrics,
                max_waiting=settings.max_waiting_requests,
            )
            services = Services(
                settings=settings,
                directory=directory,
                generator=generator,
                finder=RequestFinder(directory, lambda model: fleet),
                limits=KeyLimits(None),
                broker=BrokerHealth(None),
                admission=Admission(max_requests=settings.max_concurrent_requests),
                metrics=metrics,
                shared_metrics=SharedMetrics(metrics.registry),
                tracer=tracer or NoOpTracer(),
            )
            opened.append(services)
            yield services
            await generator.close()
            tokenizers.close()

        app = create_app(settings, open_services=open_services)
        server = TestServer(app)
        await server.start_server(auto_decompress=False)  # as our own connections
        client = TestClient(server)
        await client.start_server()
        client.services = opened[0]
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
async def client(make_client: MakeClient) -> TestClient:
    return await make_client()
