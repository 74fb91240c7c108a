"""Requests and frames for tests, with everything that a test does not care about filled in."""

import uuid
from dataclasses import replace

from common.messages import (
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    Sampling,
    Stopping,
    Token,
    first_chain,
    next_chain,
)


def a_request(**changes: object) -> GenerationRequest:
    """A greedy request of three prompt tokens for eight new ones."""
    request = GenerationRequest(
        id=uuid.uuid4().hex,
        model="model",
        prompt_tokens=(5, 6, 7),
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=8),
    )
    return replace(request, **changes)


def frames_of(request_id: str, texts: list[str]) -> list[Frame]:
    """The frames of a request whose tokens have these texts; the last one is terminal."""
    frames, chain = [], first_chain(request_id)
    for index, text in enumerate(texts):
        tokens = (Token(index, text, -0.5),)
        chain = next_chain(chain, tokens)
        is_last = index == len(texts) - 1
        finish = Finish(FinishReason.LENGTH, len(texts)) if is_last else None
        frames.append(Frame(tokens=tokens, chain=chain, finish=finish))
    return frames
