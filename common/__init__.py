"""The protocol between gateways and workers, and how processes are started. Imports no torch, and only its clients import HTTP libraries.

messages.py         what crosses a process boundary, as frozen dataclasses
codec.py            those as msgpack
grammar.py          what an answer must look like, as the grammar library reads it
deep_stack.py       room for it to recurse in
errors.py           every error that a caller can meet
redis_keys.py       every Redis key, with its type, lifetime, writers and readers
scripts/            the transitions of a request, one Lua script each
lua.py              runs the scripts, again after a lost reply
redis_client.py     opens clients of the broker
broker_url.py       what the URL of a broker may look like
wire.py             connections of our own to it
sentinel.py         finds the broker that a set of Sentinels has chosen
request_queue.py    both ends of the queue: enqueue and cancel, lease and append
faults.py           points at which tests can break a process
token_journal.py    reads a request's frames, each once and in order
request_store.py    requests by their id: status, watchers, orphans
subscriber.py       one pub/sub connection with many listeners
worker_registry.py  who serves what
telemetry.py        logs and traces
event_stream.py     whole server-sent events out of chunks
client.py           a client that outlives gateways; the one file that knows aiohttp
httpx_transport.py  the same for other people's clients; the one file that knows httpx
settings.py         one line a knob: field, option, environment name, help
cli.py              the `tokenfleet` command
generate.py         the `generate` command: a prompt from the terminal
queue_commands.py   the `queue` commands: depth, dead letters
serve.py            the `serve` command: everything on one machine
launcher.py         the same under the name and the flags of TGI's launcher
tgi_flags.py        those of its flags that `serve` has not
probe.py            asks a gateway of this machine whether it can answer
health.py           the `health` command, which does that for containers
machine_limits.py   memory and cores that control groups leave to this process
supervisor.py       child processes, restarted and drained
child.py            one of them
leash.py            no child outlives its parent
broker.py           a private broker for one machine
"""
