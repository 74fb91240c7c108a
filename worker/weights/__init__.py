"""From files to parameters.

files.py            find or download the files of a model
tokenizer_files.py  tokenizer, special tokens and chat template, as a gateway needs them
pieces.py           how a tensor of a file maps onto a part of a parameter of this shard
rows.py             the same for rows, and for q, k and v that are fused
loader.py           stream the tensors into a model, and prove that it is complete
prepare.py          what was named, as a folder of safetensors: finds and converts
convert.py          `.bin` checkpoints to safetensors
gguf.py             a GGUF file as a Hugging Face folder
once.py             folders that are made once, and appear complete
progress.py         what takes how long, for people
download.py         the `download-weights` command
demo_model.py       fetch, verify and convert the demo model, once
"""
