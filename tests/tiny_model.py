"""A random model of a few bytes with a chat template: it says nothing, but a grammar makes it say what fits."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

END = "<|end|>"
TEMPLATE = """
{%- for message in messages %}
  {%- if message['role'] == 'system' %}{{ raise_exception('there is no system role') }}{% endif -%}
  <{{ message['role'] }}>{{ message['content'] }}
{%- endfor %}<assistant>"""


def save_tiny_model(folder: Path) -> None:
    """Write a checkpoint with one token for each byte."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=256,
    )
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder)
