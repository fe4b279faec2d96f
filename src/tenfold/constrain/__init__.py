"""Constrained decoding: what a request demands of an output -> which tokens may come next.

`grammar` writes grammars as text, `nursery` compiles strangers' grammars where they can do no harm, `vocabulary` knows
the tokens as bytes, `matcher` follows one completion. Knows nothing of HTTP, engines and sampling.
"""
