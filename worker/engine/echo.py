"""The echo model: no weights, no torch, ready at once. For tests, demos and for measuring
everything but a model.

It answers with its prompt, token by token, then ends the sequence; who ignores the end hears the
prompt again:

    prompt   a b c                      prompt length n = 3
    answer   a b c <end> a b c <end>    token k is prompt[k % (n + 1)], the end if that is n

With a salt, every token but the end is a hash of (salt, previous token, position), so a text tells
which worker made it. It checks every plan as strictly as a real engine would suffer from a wrong
one. Knows plans; no models, no Redis.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass, field

from common.errors import ValidationError
from common.messages import Failure
from worker.engine.loaded import LoadedModel
from worker.engine.plan import (
    NO_TOKEN,
    Chunk,
    KvCacheLayout,
    PromptLogprobs,
    Sampled,
    SequenceStart,
    StepPlan,
    StepResult,
)
from worker.settings import WorkerSettings

NUM_BYTES = 256  # tokens 0 to 255 are the bytes themselves
END_TOKEN = NUM_BYTES
VOCAB_SIZE = NUM_BYTES + 1
END_TEXT = "<|endoftext|>"
MAX_TOTAL_TOKENS = 32768
CACHE_TOKENS = 1 << 19  # there is no cache, so any number would do
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}"  # the answer to a chat is its last message
_PRINTABLE = range(0x20, 0x7F)
_NO_GRAMMAR = Failure(
    ValidationError.kind, "Input validation error: grammar is not supported by the echo model"
)
_OTHERS_LOGPROB = -20.0  # of the tokens that were not chosen: they have next to no probability


@dataclass(slots=True)
class _Slot:
    """A sequence: what it began with, its tokens so far, and how many positions its blocks hold."""

    start: SequenceStart
    tokens: list[int]
    num_blocks: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.start.prompt_tokens)


@dataclass(slots=True)
class EchoEngine:
    """An engine (see `worker.engine.loaded.Engine`) whose forward pass is a sleep of `delay_s`."""

    layout: KvCacheLayout
    delay_s: float = 0.0
    salt: str = ""
    _slots: dict[int, _Slot] = field(default_factory=dict)

    def step(self, plan: StepPlan) -> StepResult:
        """Run a plan; AssertionError where a real engine would read or write the wrong memory."""
        for slot in plan.released:
            del self._slots[slot]
        for start in plan.started:
            assert 0 <= start.slot < self.layout.num_slots, f"there is no slot {start.slot}"
            assert start.slot not in self._slots, f"slot {start.slot} is taken"
            assert start.prompt_tokens, "a sequence begins with a prompt"
            self._slots[start.slot] = _Slot(start, [*start.prompt_tokens, *start.output_tokens])
        if self.delay_s:
            time.sleep(self.delay_s)
        prompts, sampled = [], []
        for chunk in plan.chunks:
            slot = self._slots[chunk.slot]
            self._check(chunk, slot)
            if slot.start.prompt_logprobs and chunk.start < slot.num_prompt_tokens:
                prompts.append(_prompt_logprobs(chunk, slot))
            if chunk.is_sampled:
                sampled.append(self._choose(chunk, slot))
        return StepResult(plan.step, tuple(sampled), tuple(prompts))

    def close(self) -> None:
        """Forget every sequence."""
        self._slots.clear()

    def _check(self, chunk: Chunk, slot: _Slot) -> None:
        """The chunk continues what the slot holds, and its blocks have room for it."""
        end = chunk.start + len(chunk.tokens)
        assert chunk.tokens, "a chunk has tokens"
        assert tuple(slot.tokens[chunk.start : end]) == chunk.tokens, (
            f"slot {chunk.slot}: positions {chunk.start} to {end} hold other tokens"
        )
        assert not chunk.is_sampled or end == len(slot.tokens), (
            "only the last token has a successor"
        )
        for block in chunk.new_blocks:
            assert 0 <= block < self.layout.num_blocks, f"there is no block {block}"
        slot.num_blocks += len(chunk.new_blocks)
        assert end <= slot.num_blocks * self.layout.block_size, (
            f"slot {chunk.slot}: no block for its tokens"
        )

    def _choose(self, chunk: Chunk, slot: _Slot) -> Sampled:
        if slot.start.sampling.grammar is not None:
            return Sampled(chunk.slot, NO_TOKEN, math.nan, failure=_NO_GRAMMAR)
        position = len(slot.tokens)
        token = self._next_token(slot, position)
        slot.tokens.append(token)
        return Sampled(chunk.slot, token, 0.0, _top(token, slot.start.sampling.top_n_tokens))

    def _next_token(self, slot: _Slot, position: int) -> int:
        """A function of the prompt and the position, and with a salt of the token before."""
        prompt = slot.start.prompt_tokens
        num_generated = position - len(prompt)
        turn = num_generated % (len(prompt) + 1)
        if turn == len(prompt) and num_generated >= slot.start.min_new_tokens:
            return END_TOKEN
        if not self.salt:
            return prompt[turn % len(prompt)]
        seed = f"{self.salt}/{slot.tokens[-1]}/{position}".encode()
        digest = hashlib.blake2b(seed, digest_size=4).digest()
        return _PRINTABLE[int.from_bytes(digest, "little") % len(_PRINTABLE)]


def load_echo(settings: WorkerSettings) -> LoadedModel:
    """The echo model in the size that the settings ask for."""
    max_total_tokens = settings.max_total_tokens or MAX_TOTAL_TOKENS
    cache_tokens = settings.max_batch_total_tokens or max(CACHE_TOKENS, max_total_tokens)
    layout = KvCacheLayout(
        num_blocks=math.ceil(cache_tokens / settings.block_size),
        block_size=settings.block_size,
        num_slots=settings.max_batch_size,
    )
    return LoadedModel(
        engine=EchoEngine(layout, settings.echo_delay_ms / 1000, settings.echo_salt),
        layout=layout,
        tokenizer_json=echo_tokenizer_json(),
        architecture="echo",
        served_by="echo",
        dtype="none",
        device="cpu",
        vocab_size=VOCAB_SIZE,
        max_total_tokens=max_total_tokens,
        eos_tokens=(END_TOKEN,),
        bos_token="",
        eos_token=END_TEXT,
        chat_template=CHAT_TEMPLATE,
    )


def echo_tokenizer_json() -> str:
    """A `tokenizer.json`: byte-level BPE without merges. Token b is byte b, then the end token."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    end = {"id": END_TOKEN, "content": END_TEXT, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {character: byte for byte, character in enumerate(_byte_characters())}
        | {END_TEXT: END_TOKEN},
        "merges": [],
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end | flags],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        },
        ensure_ascii=False,
    )


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte in byte-level BPE, as in GPT-2."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(NUM_BYTES) if byte not in visible]
    return [
        chr(byte if byte in visible else NUM_BYTES + hidden.index(byte))
        for byte in range(NUM_BYTES)
    ]


def _top(chosen: int, count: int) -> tuple[tuple[int, float], ...]:
    """The chosen token, then the lowest others."""
    others = [token for token in range(min(count, VOCAB_SIZE)) if token != chosen]
    ranked = ((token, _OTHERS_LOGPROB - rank) for rank, token in enumerate(others))
    return ((chosen, 0.0), *ranked)[:count]


def _prompt_logprobs(chunk: Chunk, slot: _Slot) -> PromptLogprobs:
    """Invented, but always the same: of the prompt's tokens that this chunk's positions predict."""
    first = chunk.start + 1
    predicted = slot.start.prompt_tokens[first : chunk.start + len(chunk.tokens) + 1]
    return PromptLogprobs(chunk.slot, first, tuple(-(1 + token % 16) / 4 for token in predicted))
