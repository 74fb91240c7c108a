"""Linear layers whose weights are quantized while they are loaded: the backends of `--quantize`.

registry.py   which name means which backend, and whether the head takes part
int8.py       8-bit weights and activations, on CPU and CUDA
llm_int8.py   bitsandbytes' 8-bit weights
four_bit.py   bitsandbytes' 4-bit weights, nf4 and fp4
library.py    bitsandbytes, imported when it is needed
"""
