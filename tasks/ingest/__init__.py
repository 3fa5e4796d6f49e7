"""Reads sources of clips, draws the demo corpus, and downloads videos."""
