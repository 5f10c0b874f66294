"""How many replicas a model needs: pure decisions and the thin Ray Serve policy that asks them.

Owns scaling from latency headroom. Imports select_n_core (planning only); never deployments, torch.
"""
