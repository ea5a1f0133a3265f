"""Data parallelism: several engines behind one door, placed and routed to by Ray Serve."""
