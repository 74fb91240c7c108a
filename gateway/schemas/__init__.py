"""Bodies of requests and answers, as pydantic models. The only package of ours that knows pydantic.

native.py  TGI's own routes: /, /generate, /generate_stream, /tokenize, /info
"""
