"""Who calls, what it may use, how much of it, and how well it is served: tenants behind API keys.

Decided from the live policy alone; it knows neither HTTP nor Ray, and never reaches torch.
"""
