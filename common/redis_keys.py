"""Every Redis key, in one place. `{model}` is the cluster hash tag: one script touches queue, hash and journal.

| key                                  | type    | lifetime                        | written by       | read by         |
|--------------------------------------|---------|---------------------------------|------------------|-----------------|
| fleet:models                         | zset    | members pruned after a day      | worker           | gateway         |
| fleet:{model}:card                   | string  | a day after the last worker     | worker           | gateway         |
| fleet:{model}:tokenizer:<digest>     | string  | a day after the last worker     | worker           | gateway         |
| fleet:{model}:queue:resume, p0 to p2 | stream  | for ever, bounded at admission  | gateway, reaper  | worker          |
| fleet:{model}:request:<id>           | hash    | deadline + 10 min, or 10 min    | both, by scripts | both            |
|                                      |         | after the end                   |                  |                 |
| fleet:{model}:journal:<id>           | list    | as the hash                     | worker (STEP)    | gateway         |
| fleet:{model}:channel:<id>           | channel | none, holds nothing             | worker (STEP)    | gateway         |
| fleet:{model}:watch:<id>             | set     | 60 s after the last refresh     | gateway          | gateway, reaper |
| fleet:{model}:heartbeat:<worker>     | string  | one lease (5 s)                 | worker           | reaper          |
| fleet:{model}:workers                | zset    | members pruned after 10 leases  | worker           | gateway         |
| fleet:{model}:worker:<worker>        | hash    | 60 s                            | worker           | gateway         |
| fleet:{model}:dead-letters           | stream  | about 10,000 entries            | LEASE            | operator        |
| fleet:tenant:{name}:open             | zset    | a minute after the last refresh | gateway          | gateway         |
| fleet:tenant:{name}:budget           | hash    | until it is full again          | gateway          | gateway         |

A tenant is who holds an API key of that name. The queue streams have one consumer group, `GROUP`. Each script in `common/scripts/` says which of these it takes.
"""

from dataclasses import dataclass

GROUP = "workers"
MODELS = "fleet:models"
PRIORITIES = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model."""

    model: str

    @property
    def card(self) -> str:
        return self._key("card")

    def tokenizer(self, digest: str) -> str:
        return self._key(f"tokenizer:{digest}")

    def queue(self, priority: int) -> str:
        return self._key(f"queue:p{priority}")

    @property
    def resume_queue(self) -> str:
        return self._key("queue:resume")

    @property
    def queues(self) -> tuple[str, ...]:
        """All queue streams in the order in which they are served."""
        return (self.resume_queue, *(self.queue(priority) for priority in PRIORITIES))

    def request(self, request_id: str) -> str:
        return self._key(f"request:{request_id}")

    def journal(self, request_id: str) -> str:
        return self._key(f"journal:{request_id}")

    def channel(self, request_id: str) -> str:
        return self._key(f"channel:{request_id}")

    def watchers(self, request_id: str) -> str:
        return self._key(f"watch:{request_id}")

    def heartbeat(self, worker: str) -> str:
        return self._key(f"heartbeat:{worker}")

    @property
    def workers(self) -> str:
        return self._key("workers")

    def worker(self, worker: str) -> str:
        return self._key(f"worker:{worker}")

    @property
    def dead_letters(self) -> str:
        return self._key("dead-letters")

    def _key(self, tail: str) -> str:
        return f"fleet:{{{self.model}}}:{tail}"


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """What an API key uses now, over all models."""

    name: str

    @property
    def open(self) -> str:
        return f"fleet:tenant:{{{self.name}}}:open"

    @property
    def budget(self) -> str:
        return f"fleet:tenant:{{{self.name}}}:budget"
