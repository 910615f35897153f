"""Comparing runs of one experiment under several methods."""
