"""Links: the host-device path. `cuda` and `emulated` keep one contract (`base`).

It owns copy queues, events and byte counters. It knows bytes and events, not weights:
it never imports models, offload or the engine.
"""
