"""The offline stage: measures a model on a machine and writes a performance record.

It owns samples and the fit to them. It never imports the engine or the scheduler.
"""
