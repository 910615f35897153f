"""Comparing runs: what each group of runs reached and cost, which differences are beyond noise, and how to show it."""
