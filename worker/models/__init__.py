"""Model families: five bullets, the math, the table of weight names.

registry.py        architecture string to class, imported when needed
config.py          what config.json says, in our words
decoder.py         the way through any decoder: embedding, blocks, norm, head
llama.py           Llama, Mistral, Qwen2, Qwen3, SmolLM2
self_attention.py  attention as the families below have it
gpt2.py            GPT-2
gpt_bigcode.py     StarCoder, SantaCoder: GPT-2 with one key-value head
bloom.py           BLOOM, BLOOMZ
gpt_neox.py        GPT-NeoX, Pythia
opt.py             OPT, Galactica
t5_config.py       what T5's config.json says
t5.py              T5, FLAN-T5, mT5, MT0
text_style.py      families with prompts or answers of their own kind
auto.py            what else transformers can load
auto_paged.py      such a model on our paged cache
"""
