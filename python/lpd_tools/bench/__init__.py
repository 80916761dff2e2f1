"""Benchmarks: what is timed, against what, and how the tables and plots are made."""
