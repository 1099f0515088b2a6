"""What `benchmarks/gpu.py` is made of: one file for each subject."""
