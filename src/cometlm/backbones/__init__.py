"""Backbones: how a cell speaks to any family of decoders."""
