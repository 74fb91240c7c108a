"""A request inside the engine: its tokens, its blocks, how far it has come. No torch, no Redis.

WAITING ──admitted──► PREFILLING ──last prompt chunk──► DECODING ──last frame──► FINISHED
   ▲                      │                                │                        ▲
   └───────preempted──────┴────────────────────────────────┘   dropped in any state ┘
"""

import time
from collections.abc import Iterable
from enum import Enum

from common.messages import Frame, GenerationRequest, first_chain
from worker.engine.plan import SequenceStart
from worker.text.detokenizer import Detokenizer
from worker.text.stopping import StopMatcher


class SequenceState(Enum):
    """Where a sequence is; only the scheduler moves it."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


TERMINAL_SEQUENCE_STATES = frozenset({SequenceState.FINISHED})


class Sequence:
    """Mutable state of one request. Each group of attributes has one writer.

    A request that another worker began is the same class with `output_tokens` already generated:
    its whole text so far is then prefilled as if it were prompt, and generation goes on with the
    next token.

    In an encoder-decoder model the request's prompt goes to the encoder, and the decoder, whose
    tokens these are, begins with a start token:

        decoder only       tokens = prompt + output
        encoder-decoder    tokens = start token + output        encoder_tokens = prompt
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        decoder_start_token: int | None = None,
        output_tokens: tuple[int, ...] = (),
        chain: bytes = b"",
        num_frames: int | None = None,
        journaled_text: str | None = None,
        lease_token: str = "",
        leased_at: float | None = None,
        waited_s: float = 0.0,
    ) -> None:
        """`decoder_start_token` is that of an encoder-decoder model.

        `chain` and `num_frames` are the journal's; by default it has a frame for each token.
        `leased_at` is by the monotonic clock (now, if None); `waited_s` is the time in the queue
        before that.
        """
        assert chain or not output_tokens, (
            "a sequence that goes on needs the chain hash of its last frame"
        )
        self.request = request
        self.encoder_tokens: tuple[int, ...] = ()
        self.prompt_tokens = request.prompt_tokens
        if decoder_start_token is not None:
            self.encoder_tokens = request.prompt_tokens
            self.prompt_tokens = (decoder_start_token,)
        self.tokens = [*self.prompt_tokens, *output_tokens]
        self.output_tokens = list(output_tokens)

        # Written by the scheduler.
        self.state = SequenceState.WAITING
        self.slot: int | None = None
        self.blocks: list[int] = []
        self.encoder_blocks: list[int] = []  # what the decoder attends to of the encoder's tokens
        self.num_computed = 0  # tokens whose keys and values are in the pool
        self.block_hashes: list[
            bytes
        ] = []  # of the full blocks of `tokens`, as far as anybody asked
        self.num_registered = 0  # leading blocks that the prefix index knows
        self.num_cached_tokens = 0  # found in the prefix cache at the first admission
        self.started_at: float | None = None

        # Written by the output processor.
        self.chain = chain or first_chain(request.id)
        self.num_frames = len(output_tokens) if num_frames is None else num_frames
        self.detokenizer: Detokenizer | None = None
        self.stop_matcher: StopMatcher | None = None
        self.prompt_logprobs: list[float | None] = []
        self.first_token_at: float | None = None
        self.journaled_text = journaled_text  # what clients have seen, to prove the replay right

        # Written by whoever leased it.
        self.lease_token = lease_token
        self.leased_at = time.monotonic() if leased_at is None else leased_at
        self.waited_s = waited_s

    @classmethod
    def from_journal(
        cls,
        request: GenerationRequest,
        frames: Iterable[Frame],
        *,
        decoder_start_token: int | None = None,
        lease_token: str = "",
        leased_at: float | None = None,
        waited_s: float = 0.0,
    ) -> "Sequence":
        """The sequence that goes on where a journal ends, which may be empty but not terminal."""
        frames = tuple(frames)
        assert not any(frame.is_terminal for frame in frames), (
            "a request that has ended cannot go on"
        )
        tokens = [token for frame in frames for token in frame.tokens]
        return cls(
            request,
            decoder_start_token=decoder_start_token,
            output_tokens=tuple(token.id for token in tokens),
            chain=frames[-1].chain if frames else b"",
            num_frames=len(frames),
            journaled_text="".join(token.text for token in tokens if not token.is_special),
            lease_token=lease_token,
            leased_at=leased_at,
            waited_s=waited_s,
        )

    def __repr__(self) -> str:
        progress = f"{self.num_computed}/{len(self.tokens)} computed"
        return f"<Sequence {self.request.id} {self.state.value} slot={self.slot} {progress}>"

    @property
    def num_tokens(self) -> int:
        """Prompt and output, the newest token included; of the decoder, where there are two."""
        return len(self.tokens)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's log-probabilities are to be told: the first frame carries them."""
        return self.request.prompt_logprobs and self.num_frames == 0

    @property
    def max_positions(self) -> int:
        """Places in the KV cache that its tokens can ever need: the last is told, but never run."""
        return len(self.prompt_tokens) + self.request.stopping.max_new_tokens - 1

    def place(
        self, slot: int, blocks: list[int], *, num_cached: int, encoder_blocks: list[int]
    ) -> None:
        """Let it run in a slot; the first `num_cached` tokens of its blocks are there already."""
        self.slot = slot
        self.blocks = blocks
        self.encoder_blocks = encoder_blocks
        self.num_computed = num_cached
        self.state = SequenceState.PREFILLING

    def vacate(self) -> None:
        """Let it wait again, with nothing computed. Its tokens and its text stay."""
        self.slot = None
        self.blocks = []
        self.encoder_blocks = []
        self.num_computed = self.num_registered = 0
        self.state = SequenceState.WAITING

    def start(self) -> SequenceStart:
        """What an engine must know of a sequence that takes a slot."""
        assert self.slot is not None
        return SequenceStart(
            self.slot,
            self.prompt_tokens,
            tuple(self.output_tokens),
            self.request.sampling,
            min_new_tokens=self.request.stopping.min_new_tokens,
            prompt_logprobs=self.wants_prompt_logprobs,
            encoder_tokens=self.encoder_tokens,
            encoder_blocks=tuple(self.encoder_blocks),
        )

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.output_tokens.append(token)
