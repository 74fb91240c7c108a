"""Runs the broker's real scripts, on the Lua that Redis and Valkey embed."""

from collections.abc import Callable
from typing import Any

from lupa.lua51 import LuaRuntime, lua_type

from tests.simulation.replies import Error, Status, Value


class Lua:
    """The script engine. One for many brokers: a script is compiled once."""

    def __init__(self) -> None:
        self._runtime = LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self._compiled: dict[bytes, Any] = {}
        self._call: Callable[..., Value] | None = None
        self._to_table = self._runtime.table_from
        lua = self._runtime.globals()
        lua[b"redis"] = self._to_table({b"call": self._redis_call, b"pcall": self._redis_pcall})

    def run(
        self, source: bytes, keys: list[bytes], args: list[bytes], call: Callable[..., Value]
    ) -> Value:
        """Run a script whose commands go to `call`."""
        script = self._compiled.get(source)
        if script is None:
            code = b"return function(KEYS, ARGV)\n" + source + b"\nend"
            script = self._compiled[source] = self._runtime.execute(code)
        self._call = call
        return self._to_reply(script(self._to_table(keys), self._to_table(args)))

    def _redis_call(self, *parts: Any) -> Any:
        assert self._call is not None
        return self._to_lua(self._call(*map(_argument, parts)))

    def _redis_pcall(self, *parts: Any) -> Any:
        try:
            return self._redis_call(*parts)
        except Error as error:
            return self._to_table({b"err": str(error).encode()})

    def _to_lua(self, reply: Value) -> Any:
        if reply is None:
            return False
        if isinstance(reply, Status):
            return self._to_table({b"ok": bytes(reply)})
        if isinstance(reply, list):
            return self._to_table([self._to_lua(item) for item in reply])
        return reply

    def _to_reply(self, value: Any) -> Value:
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, (int, float)):
            return int(value)
        if lua_type(value) == "table":
            items, index = [], 1
            while (item := value[index]) is not None:
                items.append(self._to_reply(item))
                index += 1
            return items
        return value


def _argument(value: Any) -> bytes:
    """Lua's numbers become text as in Redis."""
    if isinstance(value, bytes):
        return value
    return b"%d" % int(value) if float(value).is_integer() else repr(float(value)).encode()
