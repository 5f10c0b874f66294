"""The OpenAI dialect over HTTP: schemas, errors, streams, metrics.

It knows models only through the protocol `Backend`; it never reaches ray, torch or transformers.
"""
