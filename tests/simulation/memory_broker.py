"""A broker inside the test process: the commands that this project uses, and its real Lua scripts, on a virtual clock.

It exists for two things that fakeredis has not: its clock is a parameter, and its whole state can be copied and put back,
which is what a crash that loses the tail of an append-only file does. `test_script_transitions.py` runs the same histories
on this and on a real server, so that it cannot drift from the truth. Everything is bytes.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.lua import Lua
from tests.simulation.replies import OK, Error, Status, Value

EntryId = tuple[int, int]


@dataclass(slots=True)
class Group:
    """A consumer group: what was delivered last, and to whom the pending entries belong."""

    last: EntryId = (0, 0)
    pending: dict[EntryId, list] = field(default_factory=dict)  # [consumer, at_ms, times]


@dataclass(slots=True)
class Stream:
    entries: dict[EntryId, list[bytes]] = field(default_factory=dict)
    last: EntryId = (0, 0)
    groups: dict[bytes, Group] = field(default_factory=dict)


class MemoryBroker:
    """The state of a server. `clock` gives Unix time in seconds."""

    def __init__(self, lua: Lua, clock: Callable[[], float]) -> None:
        self._lua = lua
        self._clock = clock
        self._data: dict[bytes, Any] = {}
        self._expires: dict[bytes, int] = {}  # in ms of the clock
        self._scripts: dict[bytes, bytes] = {}
        self.run_id = 0
        self.on_publish: Callable[[bytes, bytes], int] = lambda channel, message: 0
        self.patches: dict[bytes, bytes] = {}  # sources that replace others: negative controls

    def execute(self, *parts: bytes) -> Value:
        """The reply to a command. Raises Error."""
        method = getattr(self, f"_cmd_{parts[0].decode().lower().replace(' ', '_')}", None)
        if method is None:
            raise Error(f"ERR unknown command '{parts[0].decode()}'")
        return method(*parts[1:])

    def snapshot(self) -> tuple:
        """All data, to be given to `restore` once."""
        return copy.deepcopy((self._data, self._expires))

    def restore(self, snapshot: tuple) -> None:
        """Restart with older data: what was written since is lost, and so is the script cache."""
        self._data, self._expires = snapshot
        self._scripts.clear()
        self.run_id += 1

    def wipe(self) -> None:
        """Restart without any data."""
        self.restore(({}, {}))

    @property
    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _get(self, key: bytes, make: Callable[[], Any] | None = None) -> Any:
        at = self._expires.get(key)
        if at is not None and at <= self.now_ms:
            self._forget(key)
        found = self._data.get(key)
        if found is None and make is not None:
            found = self._data[key] = make()
        return found

    def _forget(self, key: bytes) -> bool:
        self._expires.pop(key, None)
        return self._data.pop(key, None) is not None

    # Server and scripts

    def _cmd_ping(self) -> Value:
        return Status(b"PONG")

    def _cmd_client(self, *_: bytes) -> Value:
        return OK

    def _cmd_info(self, *_: bytes) -> Value:
        return b"redis_version:7.2.4\r\nrun_id:%040d\r\n" % self.run_id

    def _cmd_time(self) -> Value:
        seconds, rest = divmod(int(self._clock() * 1e6), 1_000_000)
        return [b"%d" % seconds, b"%d" % rest]

    def _cmd_script(self, verb: bytes, *parts: bytes) -> Value:
        if verb.upper() == b"FLUSH":
            self._scripts.clear()
            return OK
        sha = hashlib.sha1(parts[0]).hexdigest().encode()
        self._scripts[sha] = self.patches.get(parts[0], parts[0])
        return sha

    def _cmd_evalsha(self, sha: bytes, num_keys: bytes, *rest: bytes) -> Value:
        source = self._scripts.get(sha)
        if source is None:
            raise Error("NOSCRIPT No matching script.")
        count = int(num_keys)
        return self._lua.run(source, list(rest[:count]), list(rest[count:]), self.execute)

    # Keys

    def _cmd_exists(self, key: bytes) -> Value:
        return int(self._get(key) is not None)

    def _cmd_del(self, *keys: bytes) -> Value:
        return sum(self._forget(key) for key in keys)

    def _cmd_pexpire(self, key: bytes, ms: bytes) -> Value:
        if self._get(key) is None:
            return 0
        self._expires[key] = self.now_ms + int(float(ms))
        return 1

    def _cmd_expire(self, key: bytes, seconds: bytes) -> Value:
        return self._cmd_pexpire(key, b"%d" % (int(seconds) * 1000))

    def _cmd_pttl(self, key: bytes) -> Value:
        if self._get(key) is None:
            return -2
        return self._expires[key] - self.now_ms if key in self._expires else -1

    def _cmd_set(self, key: bytes, value: bytes, *options: bytes) -> Value:
        self._forget(key)
        self._data[key] = value
        names = [option.upper() for option in options]
        for name, factor in ((b"PX", 1), (b"EX", 1000)):
            if name in names:
                ms = int(options[names.index(name) + 1]) * factor
                self._expires[key] = self.now_ms + ms
        return OK

    def _cmd_get(self, key: bytes) -> Value:
        return self._get(key)

    # Hashes, lists, sorted sets, channels

    def _cmd_hset(self, key: bytes, *parts: bytes) -> Value:
        row = self._get(key, dict)
        before = len(row)
        row.update(zip(parts[::2], parts[1::2], strict=True))
        return len(row) - before

    def _cmd_hget(self, key: bytes, name: bytes) -> Value:
        return (self._get(key) or {}).get(name)

    def _cmd_hmget(self, key: bytes, *names: bytes) -> Value:
        row = self._get(key) or {}
        return [row.get(name) for name in names]

    def _cmd_hdel(self, key: bytes, *names: bytes) -> Value:
        row = self._get(key) or {}
        return sum(row.pop(name, None) is not None for name in names)

    def _cmd_hincrby(self, key: bytes, name: bytes, by: bytes) -> Value:
        row = self._get(key, dict)
        row[name] = b"%d" % (int(row.get(name, b"0")) + int(by))
        return int(row[name])

    def _cmd_hgetall(self, key: bytes) -> Value:
        return [part for item in (self._get(key) or {}).items() for part in item]

    def _cmd_llen(self, key: bytes) -> Value:
        return len(self._get(key) or ())

    def _cmd_rpush(self, key: bytes, *items: bytes) -> Value:
        row = self._get(key, list)
        row.extend(items)
        return len(row)

    def _cmd_rpop(self, key: bytes) -> Value:
        row = self._get(key)
        item = row.pop() if row else None
        if row is not None and not row:
            self._forget(key)
        return item

    def _cmd_lrange(self, key: bytes, first: bytes, last: bytes) -> Value:
        row, end = self._get(key) or [], int(last)
        start = int(first)
        start = max(0, start + len(row)) if start < 0 else start
        return list(row[start : end + 1 if end >= 0 else len(row) + end + 1])

    def _cmd_lindex(self, key: bytes, index: bytes) -> Value:
        row = self._get(key) or []
        return row[int(index)] if -len(row) <= int(index) < len(row) else None

    def _cmd_zadd(self, key: bytes, *parts: bytes) -> Value:
        row = self._get(key, dict)
        before = len(row)
        row.update(
            {name: float(score) for score, name in zip(parts[::2], parts[1::2], strict=True)}
        )
        return len(row) - before

    def _cmd_zrem(self, key: bytes, *names: bytes) -> Value:
        row = self._get(key) or {}
        return sum(row.pop(name, None) is not None for name in names)

    def _cmd_zremrangebyscore(self, key: bytes, low: bytes, high: bytes) -> Value:
        row = self._get(key) or {}
        gone = [name for name, score in row.items() if float(low) <= score <= float(high)]
        return self._cmd_zrem(key, *gone)

    def _cmd_zrange(self, key: bytes, first: bytes, last: bytes, *options: bytes) -> Value:
        row = sorted((self._get(key) or {}).items(), key=lambda item: (item[1], item[0]))
        assert (first, last) == (b"0", b"-1"), "only whole sets are read"
        if not options:
            return [name for name, _ in row]
        return [part for name, score in row for part in (name, repr(score).encode())]

    def _cmd_publish(self, channel: bytes, message: bytes) -> Value:
        return self.on_publish(channel, message)

    # Streams

    def _cmd_xadd(self, key: bytes, *parts: bytes) -> Value:
        at = parts.index(b"*")
        stream = self._get(key, Stream)
        now = self.now_ms
        last = stream.last
        stream.last = (now, 0) if now > last[0] else (last[0], last[1] + 1)
        stream.entries[stream.last] = list(parts[at + 1 :])
        return _entry(stream.last)

    def _cmd_xlen(self, key: bytes) -> Value:
        stream = self._get(key)
        return len(stream.entries) if stream else 0

    def _cmd_xdel(self, key: bytes, *entries: bytes) -> Value:
        stream = self._get(key)
        return sum(
            stream.entries.pop(_parse(entry), None) is not None for entry in entries if stream
        )

    def _cmd_xrange(self, key: bytes, first: bytes, last: bytes, *options: bytes) -> Value:
        stream = self._get(key)
        low, high = _bound(first), _bound(last)
        rows = [
            [_entry(entry), fields]
            for entry, fields in (stream.entries.items() if stream else ())
            if low <= entry <= high
        ]
        return rows[: int(options[1])] if options else rows

    def _cmd_xgroup(
        self, verb: bytes, key: bytes, name: bytes, start: bytes, *rest: bytes
    ) -> Value:
        assert (verb.upper(), start) == (b"CREATE", b"0"), "groups begin with the first entry"
        stream = self._get(key, Stream if rest else None)
        if stream is None:
            raise Error("ERR The XGROUP subcommand requires the key to exist.")
        if name in stream.groups:
            raise Error("BUSYGROUP Consumer Group name already exists")
        stream.groups[name] = Group()
        return OK

    def _group(self, key: bytes, name: bytes) -> tuple[Stream, Group]:
        stream = self._get(key)
        if stream is None or name not in stream.groups:
            raise Error(f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'")
        return stream, stream.groups[name]

    def _cmd_xack(self, key: bytes, name: bytes, *entries: bytes) -> Value:
        stream = self._get(key)
        if stream is None or name not in stream.groups:
            return 0
        pending = stream.groups[name].pending
        return sum(pending.pop(_parse(entry), None) is not None for entry in entries)

    def _cmd_xpending(self, key: bytes, name: bytes, *options: bytes) -> Value:
        _, group = self._group(key, name)
        if not options:
            return self._pending_summary(group)
        idle = 0
        if options[0].upper() == b"IDLE":
            idle, options = int(options[1]), options[2:]
        low, high, count = _bound(options[0]), _bound(options[1]), int(options[2])
        consumer = options[3] if len(options) > 3 else None
        now = self.now_ms
        rows = [
            [_entry(entry), owner, now - at, times]
            for entry, (owner, at, times) in sorted(group.pending.items())
            if low <= entry <= high and now - at >= idle and consumer in (None, owner)
        ]
        return rows[:count]

    def _pending_summary(self, group: Group) -> Value:
        if not group.pending:
            return [0, None, None, None]
        owners: dict[bytes, int] = {}
        for owner, _, _ in group.pending.values():
            owners[owner] = owners.get(owner, 0) + 1
        rows = [[owner, b"%d" % count] for owner, count in sorted(owners.items())]
        return [len(group.pending), _entry(min(group.pending)), _entry(max(group.pending)), rows]

    def _cmd_xreadgroup(self, *parts: bytes) -> Value:
        """Never blocks; the network asks again when something was added."""
        names = [part.upper() for part in parts]
        at = names.index(b"STREAMS")
        keys = parts[at + 1 : at + 1 + (len(parts) - at - 1) // 2]
        count = int(parts[names.index(b"COUNT") + 1])
        group_name, consumer = parts[1], parts[2]
        found = []
        for key in keys:
            stream, group = self._group(key, group_name)
            fresh = [entry for entry in stream.entries if entry > group.last][:count]
            for entry in fresh:
                group.pending[entry] = [consumer, self.now_ms, 1]
            if fresh:
                group.last = fresh[-1]
                found.append([key, [[_entry(entry), stream.entries[entry]] for entry in fresh]])
        return found or None


def _entry(entry: EntryId) -> bytes:
    return b"%d-%d" % entry


def _parse(entry: bytes) -> EntryId:
    ms, _, number = entry.partition(b"-")
    return int(ms), int(number)


def _bound(text: bytes) -> EntryId:
    if text in (b"-", b"+"):
        return (0, 0) if text == b"-" else (1 << 62, 0)
    if text.startswith(b"("):
        ms, number = _parse(text[1:])
        return ms, number + 1
    return _parse(text)
