"""The values that cross a process boundary, all frozen. They know neither Redis, HTTP nor torch.

A `GenerationRequest` travels from the gateway to a worker, `Frame`s travel back, and a `ModelCard` tells the
gateway what a fleet serves. `common.codec` turns each into bytes. What is made for every token is a `msgspec.Struct`,
made, written and read in a tenth of a dataclass's time, and in no cycle that the collector would have to find; the
others are dataclasses.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import msgspec

SCHEMA_VERSION = 1  # of all messages; it is the first thing on the wire


class FinishReason(StrEnum):
    """Why a generation ended well. The values are TGI's, and no other value may reach a client."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


class RequestState(StrEnum):
    """State of a request as stored in its Redis hash; `common/scripts/` moves it."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class OnDisconnect(StrEnum):
    """What becomes of a request when nobody reads its stream any more."""

    CANCEL = "cancel"  # it ends at once
    GRACE = "grace"  # it ends when nobody came back within seconds
    RUN = "run"  # it runs to its end


TERMINAL_STATES = frozenset({RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED})


class GrammarKind(StrEnum):
    """The languages in which a client may say what an answer looks like."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole generated text must be.

    `value` is a JSON schema as JSON, a regular expression, or a Lark grammar.
    """

    kind: GrammarKind
    value: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Every value is resolved: the gateway has already drawn a missing seed.

    The rules are applied in the order in which `worker/sampling/processors.py` documents them.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bit
    top_n_tokens: int = 0
    watermark: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a generation ends."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = True  # TGI leaves the stop text in the output, OpenAI cuts it
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated generation. Nothing in it needs to be checked again by a worker."""

    id: str
    model: str
    prompt_tokens: tuple[int, ...]  # as the model sees them: special tokens added, truncation done
    sampling: Sampling
    stopping: Stopping
    prompt_logprobs: bool = False
    priority: int = 1  # 0 is served first, 2 last
    tenant: str = ""
    created_at: float = (
        0.0  # Unix time in seconds, by the gateway's clock; for people, never compared
    )
    deadline_s: float = 3600.0  # from the enqueueing on, by Redis' clock
    traceparent: str = ""  # W3C trace context, empty when tracing is off
    on_disconnect: OnDisconnect = OnDisconnect.RUN
    fingerprint: str = (
        ""  # of the client's body: a retry under the same id must be the same request
    )
    presentation: str = ""  # how the gateway shows the answer to who comes back; opaque to workers


class TopToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An alternative to a chosen token, or a token of the prompt. `logprob` is None for a prompt's first token."""

    id: int
    text: str
    logprob: float | None
    is_special: bool = False


class Token(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One generated token.

    `text` is what this token adds to the stream. It is empty while bytes of a character are missing or while the
    text might become a stop string; a later token then carries it. Special tokens carry their own name.
    """

    id: int
    text: str
    logprob: float
    is_special: bool = False
    top: tuple[TopToken, ...] = ()


class Finish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a generation ended, with the times that the response headers report (seconds)."""

    reason: FinishReason
    generated_tokens: int
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cached_tokens: int = 0  # prompt tokens whose keys and values were found in the prefix cache


class Failure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a generation ended otherwise; `kind` names a class of `common.errors`."""

    kind: str
    message: str


class Frame(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=SCHEMA_VERSION, gc=False
):
    """One element of a request's journal, and one event of its stream: its index in the journal is the event's id.

    Exactly one frame of a journal is terminal, and it is the last. The order of the fields is that on the wire.
    """

    chain: bytes = (
        b""  # see `next_chain`; empty in frames that a script wrote (cancelled, deadline)
    )
    tokens: tuple[Token, ...] = ()
    prompt: tuple[
        TopToken, ...
    ] = ()  # only in the first frame, only when prompt log-probabilities were asked for
    finish: Finish | None = None
    failure: Failure | None = None

    @property
    def is_terminal(self) -> bool:
        return self.finish is not None or self.failure is not None


def first_chain(request_id: str) -> bytes:
    """The chain hash before the first frame."""
    return hashlib.blake2b(request_id.encode(), digest_size=8).digest()


def next_chain(previous: bytes, tokens: tuple[Token, ...]) -> bytes:
    """Hash of everything generated so far; a reader that recomputes it notices any silent splice."""
    told = previous
    for token in tokens:  # mostly one
        told += token.id.to_bytes(4, "little") + token.text.encode()
    return hashlib.blake2b(told, digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker announces of its model: all that a gateway needs, so that it needs no model files."""

    model: str
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int
    tokenizer_digest: str  # names the `tokenizer.json` that the worker published beside this card
    revision: str = ""
    architecture: str = ""
    served_by: str = "engine"  # which path runs the model, see worker/engine/loaded.py
    dtype: str = ""
    device: str = ""
    quantization: str = ""
    eos_tokens: tuple[int, ...] = ()
    bos_token: str = ""
    eos_token: str = ""
    chat_template: str = ""
    max_batch_total_tokens: int = 0  # tokens that one worker's KV cache holds
    version: str = ""
    is_encoder_decoder: bool = False  # the answer does not continue the prompt
    prompt_style: str = ""  # how a prompt is prepared for the tokenizer: "" or "galactica"
    keeps_special_tokens: bool = False  # special tokens are a part of the generated text
