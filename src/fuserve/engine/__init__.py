"""The engine: which tokens go into the next step, and what becomes of its logits.

``Engine`` owns the requests; ``Scheduler`` and ``BlockManager`` decide; an executor of
``fuserve.decoder`` computes; ``Generation`` samples, detokenizes and sees when to stop.
"""
