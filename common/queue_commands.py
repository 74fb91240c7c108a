"""`tokenfleet queue`: how much waits, and what was given up."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.broker_url import BrokerUrlError, check_broker_url
from common.codec import decode
from common.errors import FleetError, RequestNotFound
from common.messages import GenerationRequest, OnDisconnect
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.request_queue import NO_LIMIT, RequestQueue
from common.request_store import RequestStore
from common.worker_registry import WorkerRegistry


@click.group()
@click.option(
    "--redis-url",
    default="redis://127.0.0.1:6379/0",
    show_default=True,
    envvar=["TOKENFLEET_REDIS_URL", "REDIS_URL"],
    help="Broker: redis://, rediss://, unix://, or redis+sentinel://host,host/service.",
    show_envvar=True,
)
@click.option("--model", help="Only this model; the default is every known one.")
@click.pass_context
def queue(context: click.Context, redis_url: str, model: str | None) -> None:
    """Look into the queue."""
    try:
        check_broker_url(redis_url)
    except BrokerUrlError as error:
        raise click.UsageError(str(error)) from error
    context.obj = (redis_url, model)


@queue.command()
@click.pass_obj
def depth(where: tuple[str, str | None]) -> None:
    """Requests that wait and run, a model a line."""

    async def show(queues: "Queues") -> None:
        for model in queues.models:
            found = await queues.queue(model).depth()
            click.echo(f"{model}  waiting={found.waiting}  running={found.running}")

    _run(where, show)


@queue.group("dead-letters", invoke_without_command=True)
@click.pass_context
def dead_letters(context: click.Context) -> None:
    """Requests that were given up because they stopped every worker that tried them."""
    if context.invoked_subcommand is not None:
        return

    async def show(queues: "Queues") -> None:
        for letter in [letter for model in queues.models for letter in await queues.letters(model)]:
            click.echo(
                f"{letter.request_id}  {letter.model}  attempts={letter.attempts}  "
                f"worker={letter.worker}  reason={letter.reason}"
            )

    _run(context.obj, show)


@dead_letters.command("show")
@click.argument("request_id")
@click.pass_obj
def show_letter(where: tuple[str, str | None], request_id: str) -> None:
    """Everything about one of them, as JSON. The prompt is shown as token ids."""

    async def show(queues: "Queues") -> None:
        click.echo(json.dumps((await queues.letter(request_id)).describe(), indent=2))

    _run(where, show)


@dead_letters.command()
@click.argument("request_id")
@click.pass_obj
def requeue(where: tuple[str, str | None], request_id: str) -> None:
    """Try it again from the start, under the same id and with a new deadline."""

    async def again(queues: "Queues") -> None:
        await queues.requeue(await queues.letter(request_id))
        click.echo(f"{request_id} waits again; read it at /requests/{request_id}/stream")

    _run(where, again)


@dead_letters.command()
@click.argument("request_id")
@click.pass_obj
def drop(where: tuple[str, str | None], request_id: str) -> None:
    """Take it from the list."""

    async def remove(queues: "Queues") -> None:
        await queues.drop(await queues.letter(request_id))
        click.echo(f"{request_id} dropped")

    _run(where, remove)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry of a model's dead letters."""

    model: str
    entry: str
    request_id: str
    attempts: int
    worker: str
    reason: str
    body: bytes

    @property
    def died_at(self) -> float:
        """Unix time by the broker's clock."""
        return int(self.entry.partition("-")[0]) / 1000

    def describe(self) -> dict[str, Any]:
        """For people."""

        own = {"id": self.request_id, "model": self.model, "reason": self.reason}
        own |= {"attempts": self.attempts, "worker": self.worker, "died_at": self.died_at}
        return {**own, "request": asdict(decode(GenerationRequest, self.body))}


class Queues:
    """The queues of the models that a broker knows."""

    def __init__(self, redis: Redis, models: list[str]) -> None:
        self._redis = redis
        self.models = models

    def queue(self, model: str) -> RequestQueue:

        return RequestQueue(self._redis, ModelKeys(model))

    async def letters(self, model: str) -> list[DeadLetter]:
        """The dead letters of a model, oldest first."""

        rows = await self._redis.xrange(ModelKeys(model).dead_letters)
        return [_letter(model, entry, fields) for entry, fields in rows]

    async def letter(self, request_id: str) -> DeadLetter:
        """The newest letter of a request. Raises RequestNotFound."""
        for model in self.models:
            for letter in reversed(await self.letters(model)):
                if letter.request_id == request_id:
                    return letter
        raise RequestNotFound(f"there is no dead letter of request {request_id}")

    async def requeue(self, letter: DeadLetter) -> None:
        """Each step may be repeated, so a command that was interrupted can be given again."""

        request = decode(GenerationRequest, letter.body)
        await RequestStore(self._redis, ModelKeys(letter.model)).forget(request.id)
        request = replace(request, on_disconnect=OnDisconnect.RUN)  # its client is long gone
        await self.queue(letter.model).enqueue(request, max_waiting=NO_LIMIT)
        await self.drop(letter)

    async def drop(self, letter: DeadLetter) -> None:

        await self._redis.xdel(ModelKeys(letter.model).dead_letters, letter.entry)


def _letter(model: str, entry: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        model=model,
        entry=entry.decode(),
        request_id=fields[b"id"].decode(),
        attempts=int(fields[b"attempts"]),
        worker=fields[b"worker"].decode(),
        reason=fields[b"reason"].decode(),
        body=fields[b"body"],
    )


def _run(where: tuple[str, str | None], work: Callable[[Queues], Awaitable[None]]) -> None:
    async def run() -> None:
        async with _opened(*where) as queues:
            await work(queues)

    try:
        asyncio.run(run())
    except (FleetError, RedisError, OSError) as error:
        raise click.ClickException(str(error)) from error


@asynccontextmanager
async def _opened(redis_url: str, model: str | None) -> AsyncIterator[Queues]:

    redis = open_redis(redis_url)
    try:
        yield Queues(redis, [model] if model else await WorkerRegistry(redis).models())
    finally:
        await redis.aclose()
