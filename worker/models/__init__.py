"""Model families: five bullets, the math, the table of weight names.

registry.py  architecture string to class, imported when needed
config.py    what config.json says, in our words
llama.py     Llama, Mistral, Qwen2, Qwen3, SmolLM2
"""
