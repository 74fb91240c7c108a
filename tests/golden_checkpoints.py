"""A BLOOM-shaped and an mT0-shaped checkpoint, tiny and random, and what transformers makes of a prompt.

Their tokenizers are of the families' kinds and know the words of TGI's test prompt, `Test request`: bytes and merges
for BLOOM, pieces with a `</s>` behind every prompt for mT0.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

PROMPT = "Test request"
INITIAL_STD = 0.35
END_AFTER = 5  # tokens of mT0's answer before its end of sequence
_END, _PAD = 1, 0  # of mT0


@dataclass(frozen=True, slots=True)
class Golden:
    """What transformers generates greedily, and how likely it is by it."""

    prompt: list[int]
    prompt_logprobs: list[float | None]
    tokens: list[int]
    logprobs: list[float]


class BloomCheckpoint:
    """A decoder: it never ends by itself, and its prompt has log-probabilities."""

    def __init__(self, folder: Path, *, num_heads: int = 4) -> None:
        self.folder = folder
        self.tokenizer = _bloom_tokenizer()
        config = transformers.BloomConfig(
            vocab_size=self.tokenizer.get_vocab_size(),
            hidden_size=8 * num_heads,
            n_layer=2,
            n_head=num_heads,
            pad_token_id=3,
        )
        self.model = _random(transformers.BloomForCausalLM, config, seed=7)
        _save(self.model, self.tokenizer, folder, eos="</s>", pad="<pad>")

    def golden(self, text: str, num_tokens: int) -> Golden:
        prompt = self.tokenizer.encode(text).ids
        out = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False
        )[0].tolist()
        logprobs = self.logprobs(prompt, out[len(prompt) :])
        before = [None, *self.logprobs(prompt[:1], prompt[1:])]
        return Golden(prompt, before, out[len(prompt) :], logprobs)

    def logprobs(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """Of `tokens`, each behind what comes before it."""
        with torch.no_grad():
            rows = self.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        return [rows[place, token].item() for place, token in zip(places, tokens, strict=True)]


class Mt0Checkpoint:
    """An encoder and a decoder; it ends its greedy answer to the prompt by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = _mt0_tokenizer()
        config = transformers.MT5Config(
            vocab_size=self.tokenizer.get_vocab_size(),
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=12,
            relative_attention_max_distance=20,
            decoder_start_token_id=_PAD,
            pad_token_id=_PAD,
            eos_token_id=_END,
            tie_word_embeddings=False,
        )
        self.model = _random(transformers.MT5ForConditionalGeneration, config, seed=11)
        self._teach_to_end()
        _save(self.model, self.tokenizer, folder, eos="</s>", pad="<pad>")

    def golden(self, text: str, num_tokens: int) -> Golden:
        prompt = self.tokenizer.encode(text).ids
        tokens = self._generate(prompt, num_tokens, ends=True)
        return Golden([_PAD], [None], tokens, self.logprobs(prompt, tokens))

    def logprobs(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """Of `tokens` of the answer, each behind what comes before it."""
        with torch.no_grad():
            answer = torch.tensor([[_PAD, *tokens]])
            rows = self.model(input_ids=torch.tensor([prompt]), decoder_input_ids=answer)
        logprobs = rows.logits[0].log_softmax(-1)
        return [logprobs[place, token].item() for place, token in enumerate(tokens)]

    def _generate(self, prompt: list[int], num_tokens: int, *, ends: bool) -> list[int]:
        out = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=_END if ends else None,
        )
        return out[0, 1:].tolist()

    def _teach_to_end(self) -> None:
        """Where another token would come, make the end a little likelier."""
        tokens = self._generate(self.tokenizer.encode(PROMPT).ids, 40, ends=False)
        place = next(n for n in range(END_AFTER, 40) if tokens[n] not in tokens[:n])
        weight = self.model.lm_head.weight
        with torch.no_grad():
            weight[_END] = weight[tokens[place]] * 1.001


def _bloom_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT] * 10, trainer)
    return tokenizer


def _mt0_tokenizer() -> Tokenizer:
    words = ("\u2581Test", "\u2581request", "\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581is")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((word, -2.0) for word in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _END)]
    )
    return tokenizer


def _random(cls: type, config: transformers.PretrainedConfig, *, seed: int) -> torch.nn.Module:
    """Weights drawn wide: with small ones a model repeats its input, whatever its layers compute."""
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.0)
            else:
                parameter.normal_(std=INITIAL_STD)
    return model


def _save(
    model: torch.nn.Module, tokenizer: Tokenizer, folder: Path, *, eos: str, pad: str
) -> None:
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
