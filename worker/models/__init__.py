"""Model families: five bullets, the math, the table of weight names.

registry.py     architecture string to class, imported when needed
config.py       what config.json says, in our words
llama.py        Llama, Mistral, Qwen2, Qwen3, SmolLM2
bloom.py        BLOOM, BLOOMZ
gpt_neox.py     GPT-NeoX, Pythia
opt.py          OPT, Galactica
gpt_bigcode.py  StarCoder, SantaCoder
gpt2.py         GPT-2
t5_config.py    what T5's config.json says
t5.py           T5, FLAN-T5, mT5, MT0
text_style.py   families with prompts or answers of their own kind
auto.py         what else transformers can load
auto_paged.py   such a model on our paged cache
"""
