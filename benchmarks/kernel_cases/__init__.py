"""What `benchmarks/kernels.py` measures: one file a kernel."""
