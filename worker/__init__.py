"""The decode engine: leases requests, decodes them in a continuous batch, publishes every token.

cli.py        the `worker` command
__main__.py   `python -m worker`
settings.py   what an operator can set
metrics.py    every metric of a worker
service/      asyncio around the engine: intake, decode loop, publishing, leases; knows Redis, not tensors
engine/       scheduler, KV blocks, and the runner that turns a plan into tokens
text/         from tokens to text: detokeniser, stop strings
sampling/     from logits to tokens
models/       one file a family, and the table of them
layers/       what models are built from
kernels/      attention over paged memory
quantization/ linear layers with weights in fewer bits
weights/      find, load and convert checkpoints
parallel/     shards of one model
"""
