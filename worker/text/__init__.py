"""Text of generated tokens, in pure Python: no torch, no Redis.

pieces.py       what a tokenizer's single tokens are, worked out once: bytes, names, specials
detokenizer.py  incremental decode that never emits half a character
stopping.py     stop strings with a held-back tail, and why a generation ends
"""
