"""Tokenizers as files: reading their vocabularies, and writing one that has the tokens of several."""
