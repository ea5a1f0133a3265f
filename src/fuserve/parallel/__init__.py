"""Models in several processes: ranks that share layers, and stages that follow each other."""
