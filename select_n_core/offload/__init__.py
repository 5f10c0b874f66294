"""Offloading: the staging ring, the streamer that fills it, and the executor around both.

It owns which unit is where at every moment of a forward.
It never imports the scheduler, the engine or the profiler.
"""
