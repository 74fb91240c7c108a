"""Bodies of requests and answers, as pydantic models. The only package of ours that knows pydantic.

native.py  TGI's own routes: /, /generate, /generate_stream, /tokenize, /info
native_answers.py  what they answer
platforms.py  what SageMaker and Vertex AI send, and /chat_tokenize
openai.py  OpenAI's routes: /v1/completions, /v1/chat/completions
openai_answers.py  what they answer
system.py  answers of /info and /v1/models
"""
