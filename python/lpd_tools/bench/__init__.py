"""Benchmarks, their baselines in plain torch, and their tables and plots."""
