"""What a client saw of a stream, and whether that is allowed: the invariants that every simulation and every chaos run checks.

indices 0, 1, 2, ... without gap, repeat or reorder; each frame chains on the one before; every token is one that some
worker's model would have said there; exactly one end, and nothing after it; the end counts what was told.
"""

import hashlib
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from common.messages import Frame, GenerationRequest, first_chain, next_chain
from worker.engine.echo import END_TOKEN

# What a model may say after (prompt, prompt and answer so far).
Says = Callable[[tuple[int, ...], list[int]], Container[int]]


@dataclass(slots=True)
class SeenStream:
    """One request as its client saw it, over all its connections."""

    request: GenerationRequest
    frames: list[tuple[int, Frame]] = field(default_factory=list)
    error: str = ""  # kind of the explicit error that ended it, if one did
    is_left: bool = False  # the client went away by itself
    num_attachments: int = 0

    @property
    def is_ended(self) -> bool:
        return (
            bool(self.error) or self.is_left or any(frame.is_terminal for _, frame in self.frames)
        )


def violations(stream: SeenStream, salts: Iterable[str], says: Says | None = None) -> list[str]:
    """What is wrong with a stream, in words; nothing is said of its explicit errors.

    The model is the echo model with one of `salts`, unless `says` tells of another.
    """
    salts = tuple(salts)

    def echo_says(prompt: tuple[int, ...], tokens: list[int]) -> set[int]:
        return {echo_token(salt, prompt, tokens) for salt in salts}

    found = [*_order(stream), *_chain(stream), *_content(stream, says or echo_says)]
    if not stream.is_ended:
        found.append("stuck: it has no end")
    return found


def _order(stream: SeenStream) -> Iterable[str]:
    indices = [index for index, _ in stream.frames]
    for expected, index in enumerate(indices):
        if index != expected:
            kind = "lost" if index > expected else "repeated"
            yield f"{kind}: frame {index} where {expected} was due"
            return
    ends = [index for index, frame in stream.frames if frame.is_terminal]
    if len(ends) > 1 or (ends and ends[0] != indices[-1]):
        yield f"ends at {ends} of {indices[-1]}"
    if ends and stream.error:
        yield f"an error ({stream.error}) after the end"


def _chain(stream: SeenStream) -> Iterable[str]:
    chain = first_chain(stream.request.id)
    for index, frame in stream.frames:
        if not frame.chain:
            continue
        chain = next_chain(chain, frame.tokens)
        if frame.chain != chain:
            yield f"changed: frame {index} does not chain"
            return


def _content(stream: SeenStream, says: Says) -> Iterable[str]:
    request = stream.request
    said = [token.id for _, frame in stream.frames for token in frame.tokens]
    if len(said) > request.stopping.max_new_tokens:
        yield f"{len(said)} tokens, {request.stopping.max_new_tokens} were asked for"
    tokens = list(request.prompt_tokens)
    for number, token in enumerate(said):
        if token not in says(request.prompt_tokens, tokens):
            yield f"changed: token {number} is one that no worker says there"
            return
        tokens.append(token)
    finish = stream.frames[-1][1].finish if stream.frames else None
    if finish and finish.generated_tokens != len(said):
        yield f"the end counts {finish.generated_tokens} tokens, {len(said)} were told"


def echo_token(salt: str, prompt: tuple[int, ...], tokens: list[int]) -> int:
    """What the echo model of that salt says after `tokens`. Written anew, so that it can disagree."""
    turn = (len(tokens) - len(prompt)) % (len(prompt) + 1)
    if turn == len(prompt):
        return END_TOKEN
    if not salt:
        return prompt[turn]
    seed = f"{salt}/{tokens[-1]}/{len(tokens)}".encode()
    number = int.from_bytes(hashlib.blake2b(seed, digest_size=4).digest(), "little")
    return 0x20 + number % 95
