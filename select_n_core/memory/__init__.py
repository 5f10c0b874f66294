"""Memory: the one device arena and exact host maps.

It owns bytes and their lifetime, not their meaning.
It never imports links, models, offload or the engine.
"""
