"""The measurements of benchmarks/serving.py, a file each."""
