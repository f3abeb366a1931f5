"""Sparse autoencoders and language models as plain torch objects; nothing in here imports Django."""
