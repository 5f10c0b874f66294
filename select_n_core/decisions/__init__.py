"""Pure decisions: facts in, decision out, frozen dataclasses both ways; no clock, no torch, no I/O.

The same functions run in the replica, in the cluster and in the simulator.
Imports nothing above itself: no links, no models, no engine.
"""
