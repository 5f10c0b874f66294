"""The engine: scheduler, sampler, the loop that runs steps, and the two clients that reach it.

It owns requests from arrival to their last token. It never imports ray or HTTP;
`messages`, `client` and `text` load without torch, so what imports them starts fast.
"""
