"""T5 and mT5 compute what transformers computes, through the real scheduler: tokens exactly,
log-probabilities to 1e-4, in float32."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from common.errors import FleetError
from common.messages import Frame, GenerationRequest, Sampling, Stopping, TopToken
from tests.checkpoints import INITIAL_STD, VOCAB_SIZE, random_prompt, save_tokenizer
from tests.parity import ThreadedShards
from worker.engine.engine import build_engine
from worker.engine.loaded import LoadedModel
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.service.output import OutputProcessor
from worker.settings import WorkerSettings

START, NUM_TOKENS = 2, 8
# Some beyond the longest distance of every checkpoint.
PROMPTS = [random_prompt(n, seed=n) for n in (1, 2, 3, 4, 7, 8, 12, 19, 26, 41)]

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    decoder_start_token_id=START,
    pad_token_id=0,
    eos_token_id=1,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=20,
)


@dataclass(frozen=True)
class Kind:
    """A model to be made; a head of its own is one that differs from the embedding."""

    config: transformers.PretrainedConfig
    has_own_head: bool = False


def t5(**changes: object) -> transformers.PretrainedConfig:
    return transformers.T5Config(**SIZES | changes)


def mt5(**changes: object) -> transformers.PretrainedConfig:
    return transformers.MT5Config(**SIZES | changes)


ODD = dict(d_model=32, d_kv=12, d_ff=42, num_layers=2, num_heads=3)  # heads * d_kv = 36
DEEP = dict(d_model=20, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=3, num_heads=7)
WIDE = dict(d_model=24, d_kv=16, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=4)
NEW = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)

KINDS = {
    "t5-odd": Kind(t5(**ODD)),
    "t5-deep": Kind(t5(**DEEP, relative_attention_num_buckets=32)),
    "t5-wide-gelu": Kind(t5(**WIDE, feed_forward_proj="gelu")),
    "flan-odd": Kind(t5(**ODD, **NEW), has_own_head=True),
    "flan-deep": Kind(t5(**DEEP, **NEW), has_own_head=True),
    "flan-wide-tied": Kind(t5(**WIDE, **NEW)),
    "mt5-odd": Kind(mt5(**ODD), has_own_head=True),
    "mt5-deep-silu": Kind(mt5(**DEEP, feed_forward_proj="gated-silu"), has_own_head=True),
    "mt5-wide-tied": Kind(mt5(**WIDE)),
}


def save_model(folder: Path, kind: Kind, *, seed: int) -> torch.nn.Module:
    """Write a random model and a word tokenizer; the model, in float32, is the oracle."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        kind.config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if kind.has_own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                kind_of_weight = name.split(".")[-2]
                parameter.normal_(std=STDS.get(kind_of_weight, INITIAL_STD))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


# Scores are not scaled, so narrow queries and keys keep a softmax soft; wide outputs outweigh the
# token itself, which a tied head would repeat.
STDS = {"q": 0.2, "k": 0.2, "o": 0.8, "wo": 0.8, "shared": 0.3, "relative_attention_bias": 2.0}


class Family:
    """A checkpoint on disk, its oracle, and engines that run it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.oracle = save_model(folder, KINDS[name], seed=60 + list(KINDS).index(name))
        self._answers: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def answer(self, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        if prompt not in self._answers:
            self._answers[prompt] = greedy_oracle(self.oracle, prompt)
        return self._answers[prompt]

    def load(self, **settings: object) -> LoadedModel:
        return load(self.folder, **settings)

    def check(self, run: "Run") -> None:
        assert run.ended, "nothing ran"
        for prompt, ended in run.ended:
            tokens, logprobs = self.answer(prompt)
            assert ended.tokens == tokens[-len(ended.tokens) :]
            expected = logprobs[-len(ended.tokens) :]
            torch.testing.assert_close(ended.logprobs, expected, atol=1e-4, rtol=0)


def load(folder: Path, **settings: object) -> LoadedModel:
    return build_engine(settings_of(folder, **settings))


def settings_of(folder: Path, **settings: object) -> WorkerSettings:
    values = dict(model_id=str(folder), device="cpu", dtype="float32", threads=1)
    values |= dict(block_size=4, max_total_tokens=64, max_batch_size=8) | settings
    return WorkerSettings(**values)


def greedy_oracle(model: torch.nn.Module, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=False,  # its cache has the encoder's number of layers, whatever the decoder has
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[0, 0] == START
    tokens = out.sequences[0, 1:].tolist()
    rows = zip(out.logits, tokens, strict=True)
    return tokens, [step[0].log_softmax(-1)[token].item() for step, token in rows]


def a_request(prompt: tuple[int, ...], name: str = "r", **fields: object) -> GenerationRequest:
    stopping = Stopping(NUM_TOKENS, ignore_eos=True)
    return GenerationRequest(name, "model", prompt, Sampling(), stopping, **fields)


@dataclass
class Ended:
    """What clients got of a request."""

    frames: list[Frame] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token.id for frame in self.frames for token in frame.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for frame in self.frames for token in frame.tokens]


class Run:
    """Requests through scheduler, engine and output processor, as a worker runs them."""

    def __init__(
        self, loaded: LoadedModel, sequences: Iterable[Sequence], *, max_step_tokens: int = 256
    ) -> None:
        self.ended: list[tuple[tuple[int, ...], Ended]] = []
        self.scheduler = Scheduler(loaded.layout, max_step_tokens=max_step_tokens)
        self.num_steps = 0
        processor = OutputProcessor(
            Tokenizer.from_str(loaded.tokenizer_json),
            eos_tokens=frozenset(loaded.eos_tokens),
            special_tokens=frozenset(),
            continues_prompt=not loaded.is_encoder_decoder,
        )
        by_sequence: dict[str, Ended] = {}
        for sequence in sequences:
            processor.start(sequence)
            self.scheduler.add(sequence)
            ended = by_sequence[sequence.request.id] = Ended()
            self.ended.append((sequence.request.prompt_tokens, ended))
        while (plan := self.scheduler.plan()) is not None:
            result = loaded.engine.step(plan)
            outputs = processor.advance(plan, result, self.scheduler.sequence_at)
            self.scheduler.commit(plan, outputs)
            self.scheduler.check()
            self.num_steps += 1
            for output in outputs:
                by_sequence[output.sequence.request.id].frames.append(output.frame)


def sequences(prompts: Iterable[tuple[int, ...]] = PROMPTS) -> list[Sequence]:
    return [
        Sequence(a_request(prompt, str(index)), decoder_start_token=START)
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def loaded(family: Family) -> LoadedModel:
    return family.load()


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("flan"), "flan-odd")


def test_the_oracle_is_not_trivial(family: Family) -> None:
    answers = [family.answer(prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens, _ in answers}) >= len(PROMPTS) - 1
    assert sum(len(set(tokens)) for tokens, _ in answers) > 3 * len(PROMPTS)
    assert min(min(logprobs) for _, logprobs in answers) < -0.01


def test_alone(family: Family, loaded: LoadedModel) -> None:
    assert loaded.is_encoder_decoder and loaded.decoder_start_token == START
    for one in sequences():
        family.check(Run(loaded, [one]))


@pytest.mark.parametrize("max_step_tokens", [9, 30, 500])
def test_mixed_batch(family: Family, loaded: LoadedModel, max_step_tokens: int) -> None:
    """Eight slots for ten requests, in blocks that hold what earlier ones left, or NaN."""
    for rows in loaded.engine._runner._cache.layers:
        rows.fill_(float("nan"))
    family.check(Run(loaded, sequences(), max_step_tokens=max_step_tokens))


def test_after_preemption(family: Family) -> None:
    loaded = family.load(block_size=1, max_batch_total_tokens=65)
    run = Run(loaded, sequences(), max_step_tokens=32)
    assert run.scheduler.num_preemptions > 0
    family.check(run)


@pytest.mark.parametrize("max_step_tokens", [9, 64])
def test_taken_over_from_another_worker(
    family: Family, loaded: LoadedModel, max_step_tokens: int
) -> None:
    """The decoder's tokens so far are its prompt: several rows at once, whole or in pieces."""
    taken_over = []
    for index, prompt in enumerate(PROMPTS):
        begun = tuple(family.answer(prompt)[0][: 1 + index % (NUM_TOKENS - 1)])
        taken_over.append(
            Sequence(
                a_request(prompt, str(index)),
                decoder_start_token=START,
                output_tokens=begun,
                chain=b"12345678",
            )
        )
    family.check(Run(loaded, taken_over, max_step_tokens=max_step_tokens))


def test_shards(family: Family, loaded: LoadedModel) -> None:
    """The biases go with their heads, in both stacks."""
    num_heads = family.oracle.config.num_heads
    if num_heads == 7:
        with pytest.raises(FleetError, match="heads must be divisible by the number of shards"):
            ThreadedShards(settings_of(family.folder), 2)
        return
    engine = ThreadedShards(settings_of(family.folder), {3: 3, 4: 2}[num_heads])
    family.check(Run(replace(loaded, engine=engine), sequences(), max_step_tokens=30))
    engine.close()


def test_an_answer_as_clients_get_it(flan: Family) -> None:
    """Its text stands alone, and its prompt is the decoder's start token."""
    prompt = PROMPTS[6]
    request = a_request(prompt, prompt_logprobs=True)
    run = Run(flan.load(), [Sequence(request, decoder_start_token=START)])
    ((_, ended),) = run.ended
    first, *others = ended.frames
    assert first.prompt == (TopToken(START, f" w{START}", None),)
    assert not any(frame.prompt for frame in others)
    assert ended.frames[-1].finish.generated_tokens == NUM_TOKENS
    text = "".join(token.text for frame in ended.frames for token in frame.tokens)
    assert text == " ".join(f"w{token}" for token in flan.answer(prompt)[0])
    assert run.num_steps == NUM_TOKENS


def test_penalties_count_the_answer_and_not_the_input(flan: Family) -> None:
    prompt = PROMPTS[5]
    sampling = replace(Sampling(), repetition_penalty=1.7)
    request = replace(a_request(prompt), sampling=sampling)
    ((_, ended),) = Run(flan.load(), [Sequence(request, decoder_start_token=START)]).ended
    out = flan.oracle.generate(
        torch.tensor([prompt]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.7,
    )
    assert ended.tokens == out[0, 1:].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types_follow_the_oracle(flan: Family, dtype: str) -> None:
    """The first token's log-probability, as far from float32 as that of the oracle in this type."""
    oracle = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        flan.folder, dtype=getattr(torch, dtype)
    ).eval()
    loaded = flan.load(dtype=dtype)
    found, expected, reference = [], [], []
    for prompt, ended in Run(loaded, sequences()).ended:
        start = torch.tensor([[START]])
        token = ended.tokens[0]
        found.append(ended.logprobs[0])
        for model, values in ((flan.oracle, expected), (oracle, reference)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt]), decoder_input_ids=start).logits[0, 0]
            values.append(logits.float().log_softmax(-1)[token].item())
    error = (torch.tensor(found) - torch.tensor(expected)).abs().mean()
    assert error < 2 * (torch.tensor(reference) - torch.tensor(expected)).abs().mean() + 1e-3


def test_float16_survives_large_hidden_states(tmp_path: Path) -> None:
    """FLAN-T5's overflow: outputs of the MLP beyond 65,504, and sums of them."""
    model = save_model(tmp_path, KINDS["flan-wide-tied"], seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter *= 10_000
    model.save_pretrained(tmp_path)
    for _, ended in Run(load(tmp_path, dtype="float16"), sequences()).ended:
        assert len(ended.tokens) == NUM_TOKENS
        assert all(logprob <= 0 for logprob in ended.logprobs)
