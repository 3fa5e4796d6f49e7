"""Metrics of video: distances, consistency, motion, and the statistics of their intervals."""
