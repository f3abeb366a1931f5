"""Capture activations, train sparse autoencoders on them, evaluate the result. Torch only, no Django."""
