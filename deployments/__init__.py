"""The Ray Serve application: ingress, replicas, configuration on Ray, command line.

It owns all that knows Ray or HTTP. Decisions and the engine live in select_n_core.
"""
