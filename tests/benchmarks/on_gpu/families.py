"""Every family on the device beside transformers: tokens in float32, distributions in bfloat16."""

import copy
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.on_gpu.bench import Bench, Rows, Wrong
from tests.benchmarks.on_gpu.greedy import Answer, Greedy
from tests.checkpoints import INITIAL_STD, VOCAB_SIZE, random_prompt, save_tokenizer

NUM_TOKENS = 12
TOLERANCE = 1e-4  # of log-probabilities in float32
LENGTHS = (1, 5, 16, 23, 37, 8, 30, 2, 12, 19)
IDS = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def configs() -> dict[str, object]:
    """A few checkpoints of each family: odd head counts, grouped heads, tied and untied heads,
    biases on and off."""
    import transformers as hf

    llama = IDS | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    llama |= dict(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
    neox = IDS | dict(hidden_size=48, num_hidden_layers=3, intermediate_size=80)
    opt = IDS | dict(hidden_size=48, num_hidden_layers=3, ffn_dim=80, max_position_embeddings=128)
    gpt = IDS | dict(n_embd=48, n_layer=3, n_head=6, n_positions=128)
    t5 = dict(vocab_size=VOCAB_SIZE, decoder_start_token_id=2, pad_token_id=0, eos_token_id=1)
    t5 |= dict(d_model=32, d_kv=12, d_ff=42, num_layers=2, num_heads=3)
    flan = t5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    no_bias = dict(attention_bias=False, tie_word_embeddings=True, num_attention_heads=6)
    return {
        "llama": hf.LlamaConfig(**llama),
        "bloom, 6 heads": hf.BloomConfig(**IDS, hidden_size=48, n_layer=3, n_head=6),
        "t5": hf.T5Config(**t5),
        "bigcode": hf.GPTBigCodeConfig(**gpt),
        "llama, tied, biases": hf.LlamaConfig(
            **llama | dict(tie_word_embeddings=True, attention_bias=True, num_key_value_heads=1)
        ),
        "mistral, window": hf.MistralConfig(**llama, sliding_window=9),
        "qwen2": hf.Qwen2Config(**llama),
        "qwen3": hf.Qwen3Config(**llama, head_dim=12),
        "bloom, 8 heads": hf.BloomConfig(**IDS, hidden_size=64, n_layer=3, n_head=8),
        "neox": hf.GPTNeoXConfig(**neox, num_attention_heads=3, rope_parameters=rope),
        "neox, tied, no bias": hf.GPTNeoXConfig(**neox | no_bias, use_parallel_residual=False),
        "opt": hf.OPTConfig(**opt, num_attention_heads=4, word_embed_proj_dim=48),
        "opt-350m": hf.OPTConfig(
            **opt, num_attention_heads=3, word_embed_proj_dim=20, do_layer_norm_before=False
        ),
        "galactica": hf.OPTConfig(
            **opt,
            num_attention_heads=6,
            word_embed_proj_dim=48,
            enable_bias=False,
            activation_function="gelu",
        ),
        "bigcode, multi-head": hf.GPTBigCodeConfig(**gpt | dict(multi_query=False, n_head=3)),
        "gpt2": hf.GPT2Config(**gpt),
        "flan-t5": hf.T5Config(**flan),
        "mt5": hf.MT5Config(**flan),
    }


class Oracle:
    """A random checkpoint on disk, and transformers' model of it on the device, in float32."""

    def __init__(
        self, folder: Path, config: object, device: torch.device, *, seed: int = 0
    ) -> None:
        import transformers as hf

        self._is_encoder_decoder = bool(config.is_encoder_decoder)
        kind = hf.AutoModelForSeq2SeqLM if self._is_encoder_decoder else hf.AutoModelForCausalLM
        torch.manual_seed(seed)
        model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".weight") and parameter.dim() == 1:  # of a norm
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.1 if parameter.dim() == 1 else INITIAL_STD)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        self._model = model.to(device)

    def answer(self, prompt: tuple[int, ...]) -> Answer:
        """By `generate`, one prompt at a time."""
        ids = torch.tensor([prompt], device=self._model.device)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, -NUM_TOKENS:].tolist()
        steps = [step[0].float().log_softmax(-1).cpu() for step in out.logits]
        logprobs = [float(step[token]) for step, token in zip(steps, tokens, strict=True)]
        return Answer(tokens, logprobs, steps[0])

    @torch.inference_mode()
    def first_in_bfloat16(self, prompt: tuple[int, ...]) -> torch.Tensor:
        """The distribution of the first token, as transformers rounds."""
        model = copy.deepcopy(self._model).to(torch.bfloat16)
        ids = torch.tensor([prompt], device=self._model.device)
        more = {}
        if self._is_encoder_decoder:
            start = self._model.config.decoder_start_token_id
            more["decoder_input_ids"] = torch.tensor([[start]], device=ids.device)
        return model(ids, **more).logits[0, -1].float().log_softmax(-1).cpu()


def parity(bench: Bench) -> Rows:
    """In float32 the tokens of ten prompts must equal `generate`'s, with log-probabilities to 1e-4.
    In bfloat16 the first token's distribution must be as near to float32 as transformers' own is,
    within a factor of two."""
    chosen = list(configs().items())[: bench.size(100, 4)]
    prompts = [random_prompt(length, seed=length) for length in LENGTHS[: bench.size(10, 3)]]
    found = [_compare(bench, name, config, prompts) for name, config in chosen]
    bad = [str(row["checkpoint"]) for row in found if not row["ok"]]
    if bad:
        raise Wrong(f"differs from transformers: {', '.join(bad)}", found)
    return found


def _compare(
    bench: Bench, name: str, config: object, prompts: list[tuple[int, ...]]
) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="tokenfleet-gpu-") as folder:
        oracle = Oracle(Path(folder), config, bench.device)
        expected = [oracle.answer(prompt) for prompt in prompts]
        whole = Greedy(Path(folder), bench.device, torch.float32).answer(prompts, NUM_TOKENS)
        rounded = Greedy(Path(folder), bench.device, torch.bfloat16).answer(prompts, 1)
    num_equal = sum(
        ours.tokens == theirs.tokens for ours, theirs in zip(whole, expected, strict=True)
    )
    off = max(
        abs(a - b)
        for ours, theirs in zip(whole, expected, strict=True)
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)
    )
    our_error = _mean_error([answer.first for answer in rounded], expected)
    their_error = _mean_error([oracle.first_in_bfloat16(prompt) for prompt in prompts], expected)
    is_ok = num_equal == len(prompts) and off < TOLERANCE and our_error < 2 * their_error + 1e-3
    return {
        "checkpoint": name,
        "float32: equal answers": f"{num_equal}/{len(prompts)}",
        "logprobs off by": off,
        "bfloat16 error": our_error,
        "transformers' error": their_error,
        "ok": is_ok,
    }


def _mean_error(found: list[torch.Tensor], expected: list[Answer]) -> float:
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([(ours - theirs.first).abs().mean() for ours, theirs in pairs]).mean())
