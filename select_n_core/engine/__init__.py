"""The engine: scheduler, sampler, the loop that runs steps, and the two clients that reach it.

It owns requests from arrival to their last token. It never imports ray or HTTP;
`messages` and `text` need no torch, so the actor that tokenises stays light.
"""
