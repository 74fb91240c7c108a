"""One function a route. A handler reads the request, calls the use case and shapes the answer; it decides nothing.

body.py      the request's JSON as a pydantic model, or the error that says what is wrong with it
generate.py  /, /generate, /generate_stream, /tokenize
system.py    /health and its relatives, /info, /v1/models, /metrics
docs.py      /docs and /openapi.json
"""
