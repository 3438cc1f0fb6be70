"""Tokenizers as files: reading their vocabularies, and writing one that has the tokens of several. No library is needed but for SentencePiece."""
