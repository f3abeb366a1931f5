"""Use an SAE while a model writes: steering hooks and generation. Torch only, no Django."""
