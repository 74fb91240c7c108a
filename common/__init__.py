"""The protocol between gateways and workers, and how processes are started. Imports neither torch nor aiohttp.

messages.py         what crosses a process boundary, as frozen dataclasses
codec.py            those as msgpack
errors.py           every error that a caller can meet
redis_keys.py       every Redis key, with its type, lifetime, writers and readers
scripts/            the transitions of a request, one Lua script each
lua.py              runs the scripts, again after a lost reply
redis_client.py     opens clients of the broker
request_queue.py    both ends of the queue: enqueue and cancel, lease and append
token_journal.py    reads a request's frames, each once and in order
subscriber.py       one pub/sub connection with many listeners
worker_registry.py  who serves what
telemetry.py        logs and traces
settings.py         one line a knob: field, option, environment name, help
cli.py              the `tokenfleet` command
serve.py            the `serve` command: everything on one machine
supervisor.py       child processes, restarted and drained
child.py            one of them
leash.py            no child outlives its parent
broker.py           a private broker for one machine
"""
