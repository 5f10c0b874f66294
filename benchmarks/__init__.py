"""Measurements: figures that the README quotes come from the files these scripts write."""
