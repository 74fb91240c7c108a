"""Frames to the JSON of TGI's routes, byte for byte in its key order. Pure functions, and lean: one runs per token."""

import math
from json.encoder import encode_basestring as quote  # json.dumps(ensure_ascii=False), in C

from common.errors import FleetError, GenerationFailed, Overloaded, RateLimited
from common.messages import Finish, Frame, Token, TopToken
from gateway.generation import Completion
from gateway.validation import ValidGeneration

_GENERATION_PREFIX = "Request failed during generation: "
_MORE_COMES = '"generated_text":null,"details":null'


def number(value: float | None) -> str:
    """A log-probability as TGI writes its 32-bit floats: few digits; null when it is none."""
    if value is None:
        return "null"
    text = f"{value:.8g}"
    if "." in text or "e" in text:
        return text
    return f"{text}.0" if math.isfinite(value) else "null"


def token_json(token: Token | TopToken) -> str:
    special = "true" if token.is_special else "false"
    return (
        f'{{"id":{token.id},"text":{quote(token.text)},'
        f'"logprob":{number(token.logprob)},"special":{special}}}'
    )


def prefill_json(tokens: tuple[TopToken, ...]) -> str:
    """Tokens of a prompt; they have no `special`."""
    rows = (
        f'{{"id":{token.id},"text":{quote(token.text)},"logprob":{number(token.logprob)}}}'
        for token in tokens
    )
    return f"[{','.join(rows)}]"


def tokens_json(tokens: tuple[Token, ...] | tuple[TopToken, ...]) -> str:
    return f"[{','.join(map(token_json, tokens))}]"


def answer_json(valid: ValidGeneration, answers: list[Completion]) -> str:
    """The body of `/generate`; the first answer is the one chosen."""
    best = answers[0]
    text = quote(valid.prefix + best.text)
    if not valid.has_details:
        return f'{{"generated_text":{text}}}'
    others = ""
    if len(answers) > 1:
        rows = ",".join(_sequence_json(valid, answer) for answer in answers[1:])
        others = f',"best_of_sequences":[{rows}]'
    details = f"{{{_details_json(best)}{others}{_top_tokens_json(best)}}}"
    return f'{{"generated_text":{text},"details":{details}}}'


def error_json(error: FleetError) -> str:
    """The body of an error, and the data of an error event."""
    message = str(error)
    if isinstance(error, Overloaded) and not isinstance(error, RateLimited):
        message = "Model is overloaded"  # clients of TGI compare the text
    elif isinstance(error, GenerationFailed) and not message.startswith(_GENERATION_PREFIX):
        message = _GENERATION_PREFIX + message
    return f'{{"error":{quote(message)},"error_type":{quote(error.kind)}}}'


class StreamFormat:
    """Writes the events of one stream: `id: <request id>:<index>-<chain hash>` and `data: {...}`.

    A frame of several tokens becomes several events; only the last carries the id, because a client that comes back
    with it has then seen the whole frame.
    """

    __slots__ = ("_id", "_index", "_keeps_special_tokens", "_parts", "_valid")

    def __init__(self, valid: ValidGeneration) -> None:
        self._valid = valid
        self._keeps_special_tokens = valid.keeps_special_tokens
        self._id = valid.request.id
        self._index = 0
        self._parts: list[str] = [valid.prefix] if valid.prefix else []

    def events(self, frame_index: int, frame: Frame) -> bytes:
        """The events of one frame, ready for the wire."""
        tokens = frame.tokens
        if not tokens:
            # a worker that took over after the last token only adds the end; an event needs a token all the same
            if frame.finish is None:
                return b""
            tokens = (Token(0, "", 0.0, is_special=True),)
        name = f"id: {self._id}:{frame_index}-{frame.chain.hex()}\n"
        if len(tokens) == 1:
            return self._event(tokens[0], frame.finish, name).encode()
        earlier = "".join([self._event(token) for token in tokens[:-1]])
        return f"{earlier}{self._event(tokens[-1], frame.finish, name)}".encode()

    def error(self, error: FleetError) -> bytes:
        """The event that ends a stream which failed."""
        return error_event(error)

    def _event(self, token: Token, finish: Finish | None = None, name: str = "") -> str:
        self._index = index = self._index + 1
        if self._keeps_special_tokens or not token.is_special:
            self._parts.append(token.text)
        end = self._end(finish) if finish else _MORE_COMES
        top = f'"top_tokens":{tokens_json(token.top)},' if token.top else ""
        return f'{name}data: {{"index":{index},"token":{token_json(token)},{top}{end}}}\n\n'

    def _end(self, finish: Finish) -> str:
        valid, details = self._valid, "null"
        if valid.has_details:
            seed = _seed_json(valid.request.sampling.do_sample, valid.request.sampling.seed)
            details = (
                f'{{"finish_reason":"{finish.reason}","generated_tokens":{finish.generated_tokens},'
                f'"seed":{seed},"input_length":{valid.num_prompt_tokens}}}'
            )
        return f'"generated_text":{quote("".join(self._parts))},"details":{details}'


def error_event(error: FleetError) -> bytes:
    return f"data: {error_json(error)}\n\n".encode()


def _details_json(answer: Completion) -> str:
    finish, sampling = answer.finish, answer.request.sampling
    return (
        f'"finish_reason":"{finish.reason}","generated_tokens":{finish.generated_tokens},'
        f'"seed":{_seed_json(sampling.do_sample, sampling.seed)},'
        f'"prefill":{prefill_json(answer.prompt)},"tokens":{tokens_json(answer.tokens)}'
    )


def _sequence_json(valid: ValidGeneration, answer: Completion) -> str:
    text = quote(valid.prefix + answer.text)
    return f'{{"generated_text":{text},{_details_json(answer)}{_top_tokens_json(answer)}}}'


def _top_tokens_json(answer: Completion) -> str:
    if not any(token.top for token in answer.tokens):
        return ""
    return f',"top_tokens":[{",".join(tokens_json(token.top) for token in answer.tokens)}]'


def _seed_json(does_sample: bool, seed: int) -> str:
    return str(seed) if does_sample else "null"
