"""The HTTP side: stateless processes that queue requests and relay their tokens. Imports no torch, and no worker.

__main__.py         `python -m gateway`
cli.py              the `gateway` command
settings.py         what an operator can set
supervisor.py       several processes behind one port
server.py           one process: event loop, port, signals, draining
listener.py         the port: lets clients in
connection.py       one connection: slow clients, and answers to what is not HTTP
tls.py              certificate and key of the port
file_watch.py       notices that files changed
app.py              the application: routes, middleware, what lives as long as it does
routes.py           the table of routes
services.py         what handlers need, typed
middleware.py       around every handler: record, span, CORS, errors
access.py           whose request it is, and the key that it needs
api_keys.py         the keys, from a file
key_limits.py       what a key may use, counted in the broker
key_commands.py     the `keys` command, which makes them
record.py           what one HTTP request came to
handlers/           one function a route
schemas/            bodies of requests and answers
compression.py      bodies that come compressed, inflated up to a limit
validation.py       body and model card to a request that needs no more checks
input_limits.py     how much of everything a request may bring
grammar.py          a client's grammar, compiled once to see that it can be
model_directory.py  what the fleet serves, cached
tokenization.py     text to token ids
galactica.py        how Galactica's prompts mark sequences
admission.py        how many requests a process holds open, and a fair division of them
broker_health.py    whether the broker can take more
generation.py       the use case: queue, follow, fold, leave
watching.py         tells the broker whose streams are read
resumption.py       what a client says of coming back
presentation.py     how an answer is shown to who comes back
request_finder.py   a request by its id alone
native_format.py    frames to TGI's JSON
relay.py            frames to events, at once or when the client has read
outbox.py           their writes, back to back
sse.py              a response of server-sent events
metrics.py          every metric of this process
latency_histogram.py  one of them, observed with every token
fleet_metrics.py    gauges of queues and workers
exposition.py       /metrics, summed over the processes of a port
openai_validation.py  the same as validation.py, for OpenAI's bodies
openai_parameters.py  rules of the parameters that OpenAI's bodies share
chat.py             a conversation to a prompt
chat_template.py    the model's own template, in a sandbox
tool_calls.py       function calls: their schema, and readers that find them
json_schema.py      a client's JSON schema as it is meant
response_format.py  what an answer must look like, as a grammar
openai_format.py    answers in OpenAI's JSON
openai_stream.py    frames to OpenAI's chunks
openai_logprobs.py  log-probabilities in OpenAI's shapes
openai_errors.py    errors in OpenAI's shape
openapi.py          /openapi.json from routes and schemas
static/             the documentation page
"""
