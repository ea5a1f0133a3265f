"""What `benchmarks/serving_peers.py` and `benchmarks/soak.py` measure: servers and loads."""
