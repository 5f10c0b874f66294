"""One replica's engine: streaming executor, planner and scheduler, a library without Ray.

It owns the device arena, the host mirrors and every decision about N.
It never imports ray, fastapi, `deployments` or `autoscaler`; this file imports nothing.
"""
