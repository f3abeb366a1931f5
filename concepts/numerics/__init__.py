"""What the features of an SAE mean: top texts and statistics of every feature, logit lens. Torch only, no Django."""
