"""The engine: what runs in a step and how. The first four files are the brain and import no torch.

sequence.py       a request inside the engine
block_manager.py  pages of the KV cache, shared by prefix
scheduler.py      who runs in the next step
plan.py           a step, as sent to every shard, and its result
loaded.py         what loading a model yields
build.py          settings to a loaded model
engine.py         our engine: build it, run its steps
paged_runner.py   the forward pass of a plan on paged memory
batch.py          a plan as tensors
memory.py         how much KV cache fits
echo.py           no weights, no torch: answers with its prompt
"""
