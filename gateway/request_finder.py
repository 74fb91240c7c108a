"""Finds a request by its id alone: an id does not tell its model, so every model that is served is asked."""

import asyncio
from collections.abc import Callable

from redis.exceptions import RedisError

from common.errors import RequestNotFound, Unavailable
from common.lua import TRANSIENT
from common.messages import GenerationRequest
from common.request_store import RequestStatus, RequestStore
from gateway.model_directory import ModelDirectory


class RequestFinder:
    """Looks through the models of a directory."""

    def __init__(
        self, directory: ModelDirectory, open_store: Callable[[str], RequestStore]
    ) -> None:
        self._directory = directory
        self._open_store = open_store

    async def lookup(self, request_id: str) -> GenerationRequest | None:
        """The request, or None. Raises Unavailable without a broker."""
        if not self._directory.models:
            raise Unavailable("The service cannot answer right now: no model is served yet")
        stores = [self._open_store(model.name) for model in self._directory.models]
        try:
            found = await asyncio.gather(*(store.find(request_id) for store in stores))
        except (*TRANSIENT, RedisError) as error:
            raise Unavailable(f"the broker does not answer: {error}") from error
        return next((request for request in found if request is not None), None)

    async def find(self, request_id: str) -> GenerationRequest:
        """The request. Raises RequestNotFound and Unavailable."""
        found = await self.lookup(request_id)
        if found is None:
            raise RequestNotFound()
        return found

    async def sequences(self, request_id: str) -> list[GenerationRequest]:
        """The request alone, or the sequences that `n` or `best_of` made of it, which are numbered from 0.

        Raises RequestNotFound and Unavailable.
        """
        if request := await self.lookup(request_id):
            return [request]
        found: list[GenerationRequest] = []
        while request := await self.lookup(f"{request_id}-{len(found)}"):
            found.append(request)
        if not found:
            raise RequestNotFound()
        return found

    async def status(self, request_id: str) -> RequestStatus:
        """State and progress of a request. Raises RequestNotFound and Unavailable."""
        request = await self.find(request_id)
        try:
            status = await self._open_store(request.model).status(request_id)
        except (*TRANSIENT, RedisError) as error:
            raise Unavailable(f"the broker does not answer: {error}") from error
        if status is None:
            raise RequestNotFound()
        return status
