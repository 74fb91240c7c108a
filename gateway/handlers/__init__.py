"""One function a route. A handler reads the request, calls the use case and shapes the answer; it decides nothing.

body.py      the request's JSON as a pydantic model
body_errors.py  what is wrong with it, in a line
routing.py   which model a request is for
headers.py   TGI's headers of an answer: what computed it, and how long it took
outcome.py   what became of a generation, into metrics and records
openai.py    /v1/completions, /v1/chat/completions, /v1/models/{id}
platforms.py /invocations, /vertex, /chat_tokenize
generate.py  /, /generate, /generate_stream, /tokenize
requests.py  /requests/{id}: state, stream, cancel
system.py    /health and its relatives, /info, /v1/models, /metrics
docs.py      /docs and /openapi.json
"""
