"""What the fleet serves, as this process last saw it. Reads the registry about once a second, never per request."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from redis.exceptions import RedisError

from common.codec import DecodeError
from common.errors import ModelNotFound, Unavailable, ValidationError
from common.messages import ModelCard
from common.request_queue import QueueDepth, RequestQueue
from common.worker_registry import WorkerRegistry, WorkerStatus
from gateway.tokenization import TextTokenizer, TokenizerCache

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
_LOOK_AGAIN_S = 0.2  # shortest time between looks for a name that we do not know
_ALIVE_S = 15.0  # a worker beats several times in this time
_EMPTY = QueueDepth(waiting=0, running=0)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with all that a request for it needs."""

    card: ModelCard
    tokenizer: TextTokenizer
    workers: tuple[WorkerStatus, ...] = ()
    depth: QueueDepth = _EMPTY

    @property
    def name(self) -> str:
        return self.card.model

    @property
    def is_ready(self) -> bool:
        """Whether a worker takes requests now."""
        return any(worker.state == "ready" and worker.seen_s < _ALIVE_S for worker in self.workers)


class ModelDirectory:
    """The models by name. `run()` keeps it fresh; `find` reads memory unless the name is new."""

    def __init__(
        self,
        registry: WorkerRegistry,
        tokenizers: TokenizerCache,
        queue_of: Callable[[str], RequestQueue],
        *,
        default_model: str | None = None,
    ) -> None:
        self._registry = registry
        self._tokenizers = tokenizers
        self._queue_of = queue_of
        self._default_model = default_model
        self._models: dict[str, ServedModel] = {}
        self._only_live: str | None = None
        self._is_reachable: bool | None = None  # not asked yet
        self._refreshed_at = float("-inf")
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def models(self) -> list[ServedModel]:
        """Everything that is served: first what a worker takes requests for now, then by name.

        What no worker serves stays for its day: its queue takes requests, for workers that may come back.
        """
        return sorted(self._models.values(), key=lambda model: (not model.is_ready, model.name))

    @property
    def is_reachable(self) -> bool:
        """Whether the broker answered the last time."""
        return bool(self._is_reachable)

    @property
    def is_ready(self) -> bool:
        """Whether the broker answers and a worker takes requests."""
        return self.is_reachable and any(model.is_ready for model in self._models.values())

    @property
    def default(self) -> ServedModel | None:
        """The model of a request that names none, if that is clear: the operator's, the only one, or the only live one.

        The only live one remains it while no worker is there at all: they may be changing.
        """
        name = self._default_model
        if name is None:
            name = next(iter(self._models)) if len(self._models) == 1 else self._only_live
        return None if name is None else self._models.get(name)

    async def find(self, name: str | None) -> ServedModel:
        """The model called `name`, or the default.

        Raises ModelNotFound, ValidationError when a name is needed, Unavailable when nothing is served.
        """
        found = self._find(name)
        if found is None:
            await self._look_again()
            found = self._find(name)
        if found is None:
            raise self._not_found(name)
        return found

    async def wait_until_ready(self) -> None:
        """Return once a worker takes requests; needs `run()`."""
        while not self.is_ready:
            self._changed.clear()
            await self._changed.wait()

    async def run(self) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Read the registry once. Without a broker what was known stays, marked as not reachable."""
        async with self._lock:
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            models = [await self._load(name) for name in await self._registry.models()]
        except (RedisError, OSError, TimeoutError) as error:
            if self._is_reachable is not False:
                logger.warning("the broker does not answer: %s", error)
            self._is_reachable = False
        else:
            if not self._is_reachable:
                logger.info("the broker answers", extra={"models": len(models)})
            self._is_reachable = True
            self._take({model.name: model for model in models if model is not None})
        self._refreshed_at = asyncio.get_running_loop().time()
        self._changed.set()

    def _take(self, models: dict[str, ServedModel]) -> None:
        self._models = models
        self._tokenizers.keep_only({model.card.tokenizer_digest for model in models.values()})
        live = [model.name for model in models.values() if model.is_ready]
        if live:
            self._only_live = live[0] if len(live) == 1 else None

    def _find(self, name: str | None) -> ServedModel | None:
        return self.default if name is None else self._models.get(name)

    async def _look_again(self) -> None:
        """Many who wait for the lock with an unknown name are content with one look."""
        async with self._lock:
            if asyncio.get_running_loop().time() - self._refreshed_at > _LOOK_AGAIN_S:
                await self._refresh()

    def _not_found(self, name: str | None) -> Exception:
        if not self._models:
            what = "no model is served yet" if self._is_reachable else "the broker does not answer"
            return Unavailable(f"The service cannot answer right now: {what}")
        served = ", ".join(f"`{known.name}`" for known in self.models)
        wanted = self._default_model if name is None else name
        if wanted is None:
            return ValidationError(
                f"Input validation error: `model` must name one of the models served: {served}"
            )
        return ModelNotFound(f"The model `{wanted}` is not served here. Served: {served}")

    async def _load(self, name: str) -> ServedModel | None:
        """None when the model is half announced or was written by an incompatible version."""
        try:
            card = await self._registry.card(name)
        except DecodeError as error:
            logger.warning("cannot read the card of a model: %s", error, extra={"model": name})
            return None
        if card is None:
            return None
        tokenizer = await self._tokenizer(card)
        if tokenizer is None:
            return None
        workers = tuple(await self._registry.workers(name))
        return ServedModel(card, tokenizer, workers, await self._queue_of(name).depth())

    async def _tokenizer(self, card: ModelCard) -> TextTokenizer | None:
        try:
            tokenizer = self._tokenizers.get(card.tokenizer_digest)
            if tokenizer is None:
                data = await self._registry.tokenizer(card.model, card.tokenizer_digest)
                if data is None:
                    return None
                tokenizer = await self._tokenizers.load(card.tokenizer_digest, data)
            return tokenizer.styled(card.prompt_style)
        except ValueError as error:
            logger.error("cannot use a tokenizer: %s", error, extra={"model": card.model})
            return None
