"""One sample across many devices: the layer-level pipeline (SPEC §6)."""
