"""The command line `select-n`: one module per command, progress on stderr, results on stdout.

Modules here import ray and torch only inside the command that needs them.
"""
