"""The HTTP side: stateless processes that queue requests and relay their tokens. Imports no torch, and no worker.

__main__.py         `python -m gateway`
cli.py              the `gateway` command
settings.py         what an operator can set
supervisor.py       several processes behind one port
server.py           one process: event loop, port, signals, draining
app.py              the application: routes, middleware, what lives as long as it does
routes.py           the table of routes
services.py         what handlers need, typed
middleware.py       around every handler: record, span, CORS, errors, key
record.py           what one HTTP request came to
handlers/           one function a route
schemas/            bodies of requests and answers
validation.py       body and model card to a request that needs no more checks
model_directory.py  what the fleet serves, cached
tokenization.py     text to token ids
admission.py        how many requests a process holds open
generation.py       the use case: queue, follow, fold, cancel
native_format.py    frames to TGI's JSON
sse.py              a response of server-sent events
metrics.py          every metric of this process
fleet_metrics.py    gauges of queues and workers
exposition.py       /metrics, summed over the processes of a port
openapi.py          /openapi.json from routes and schemas
static/             the documentation page
"""
