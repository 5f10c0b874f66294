"""The paged KV cache: block tables, the block-major cache in the arena, and attention over it.

It owns which tokens lie in which block. It never imports the engine or the scheduler.
"""
