"""The cluster's controller: reports in, snapshots out, and both ends of the way between.

It owns what everybody knows of the cluster. It never stands on the path of a request, never reaches
torch, and everything but `app` and `remote` runs without Ray.
"""
