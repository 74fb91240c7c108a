"""The engine: what runs in a step and how. The first five files are the brain and import no torch.

sequence.py       a request inside the engine
block_manager.py  pages of the KV cache, shared by prefix
request_limits.py what an engine can take at all
scheduler.py      who runs in the next step
plan.py           a step, as sent to every shard, and its result
loaded.py         what loading a model yields
build.py          settings to a loaded model
engine.py         our engine: build it, run its steps
sharded.py        the same in several processes
paged_runner.py   the forward pass of a plan on paged memory
batch.py          a plan as tensors
encoder_batch.py  a plan's encoder inputs as tensors
memory.py         how much KV cache fits
resolve.py        what settings leave open, decided
fallback.py       models that transformers runs: on our paged cache, or with their own
self_check.py     whether such a path computes what the model computes
padded_engine.py  plans for a model with its own cache
padded_runner.py  its forward pass, a cache for each slot
padded_cache.py   several such caches as one padded batch
echo.py           no weights, no torch: answers with its prompt
"""
