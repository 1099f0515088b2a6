"""Names, files and weights: where backbones and memories come from and go to."""
