"""From files to parameters.

files.py            find or download the files of a model
tokenizer_files.py  tokenizer, special tokens and chat template, as a gateway needs them
pieces.py           how a tensor of a file maps onto a part of a parameter of this shard
loader.py           stream the tensors into a model, and prove that it is complete
gguf.py             a GGUF file as a Hugging Face folder
demo_model.py       fetch, verify and convert the demo model, once
"""
