"""How the embedded models were made: data, tokenizer, baselines, training. Not part of the package."""
