"""From files to parameters.

files.py            find or download the files of a model
hub.py              snapshots of hub repositories; a killed download goes on within a file
tokenizer_files.py  tokenizer, special tokens and chat template, as a gateway needs them
pieces.py           how a tensor of a file maps onto a part of a parameter of this shard
rows.py             the same for rows, and for q, k and v that are fused
tensor_file.py      safetensors files as bytes: headers, and rows block by block
matching.py         which tensor fills which part, and the proof that none is missing
scratch.py          memory that is used again, for weights on their way to a packed form
loader.py           stream the tensors into a model, a few threads at a time
prepare.py          what was named, as a folder of safetensors: finds and converts
convert.py          `.bin` checkpoints to safetensors
gguf.py             a GGUF file as a Hugging Face folder
once.py             folders that are made once, and appear complete
progress.py         what takes how long, for people
download.py         the `download-weights` command
demo_model.py       fetch, verify and convert the demo model, once
"""
