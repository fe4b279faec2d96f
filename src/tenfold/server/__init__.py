"""`tenfold serve`: OpenAI's and Anthropic's protocols over an engine in a process of its own.

`app` and what it imports speak HTTP and know no tensors; `worker` runs the engine and knows no HTTP; `wire` is all
that passes between them.
"""
