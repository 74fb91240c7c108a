"""`python -m tests.chaos.child KIND[,KIND] worker ...`: the command line of a fleet in which something is broken on purpose.

    poison       a prompt that begins with POISON ends its worker in its first step, as a segmentation fault would
    no-fence     STEP appends whatever anybody sends
    no-journal   a gateway trusts the channel and never looks at the journal
    no-hash      nobody compares chain hashes
    only-publish STEP publishes and does nothing else: what durability is measured against

Those that begin with `no-` are the negative controls: a harness that finds nothing then is worth nothing.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

import common.token_journal
from common.cli import main
from common.lua import Scripts
from common.token_journal import JournalReader

POISON = "poison"


class _Anything(bytes):
    """Equal to whatever it is compared with."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


def poison() -> None:
    if sys.argv[1] != "worker":
        return
    from worker.engine.echo import EchoEngine

    step = EchoEngine.step

    def deadly_step(self: EchoEngine, plan):
        for start in plan.started:
            if bytes(start.prompt_tokens).startswith(POISON.encode()):
                os.kill(os.getpid(), signal.SIGKILL)
        return step(self, plan)

    EchoEngine.step = deadly_step


def no_fence() -> None:
    _rewrite("step", ("m[1] ~= token", "false"), ("length ~= place + 1", "false"))


def no_journal() -> None:
    async def trust_the_channel(self: JournalReader) -> None:
        """Look at nothing."""

    JournalReader._look = trust_the_channel


def no_hash() -> None:
    common.token_journal.next_chain = lambda *_: _Anything(b"x")
    common.token_journal._is_same = lambda *_: True
    JournalReader._check_expected = lambda *_: None
    _rewrite("reseed", ("shared > 0 and chain(", "false and chain("))


_ONLY_PUBLISH = """
local out = {}
for i = 0, #KEYS / 4 - 1 do
  local base, kind, frame = tonumber(ARGV[4 * i + 5]), ARGV[4 * i + 6], ARGV[4 * i + 7]
  if kind ~= 'touch' then redis.call('PUBLISH', KEYS[4 * i + 4], base .. ':' .. frame) end
  if kind == 'finished' or kind == 'failed' then
    local entry = redis.call('HGET', KEYS[4 * i + 1], 'entry')
    redis.call('XACK', KEYS[4 * i + 3], ARGV[1], entry)
    redis.call('XDEL', KEYS[4 * i + 3], entry)
    redis.call('DEL', KEYS[4 * i + 1])
  end
  out[i + 1] = base + 1
end
return out
"""


def only_publish() -> None:
    no_journal()
    _replace("step", lambda source: _ONLY_PUBLISH)


def _rewrite(name: str, *changes: tuple[str, str]) -> None:
    def change(source: str) -> str:
        for old, new in changes:
            assert old in source, f"{name}.lua does not say {old!r} any more"
            source = source.replace(old, new)
        return source

    _replace(name, change)


def _replace(name: str, change: Callable[[str], str]) -> None:
    """Let this process send another script under the name."""
    construct = Scripts.__init__

    def constructed(self: Scripts, *arguments, **options) -> None:
        construct(self, *arguments, **options)
        source = self._sources[name] = change(self._sources[name])
        self._shas[name] = hashlib.sha1(source.encode()).hexdigest()

    Scripts.__init__ = constructed


def nothing() -> None:
    """Break nothing."""


KINDS = {
    "nothing": nothing,
    "poison": poison,
    "no-fence": no_fence,
    "no-journal": no_journal,
    "no-hash": no_hash,
    "only-publish": only_publish,
}


def run(kinds: Sequence[str]) -> None:
    for kind in kinds:
        KINDS[kind]()
    main()


if __name__ == "__main__":
    chosen = sys.argv.pop(1)
    run(chosen.split(","))
