"""Which replica answers a call: chosen by the latest snapshot, asked, and once asked elsewhere.

Decisions are `select_n_core.decisions.routing`; here they meet the snapshot and Ray Serve. Only
`router` knows Ray; nothing here reaches torch.
"""
