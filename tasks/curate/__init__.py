"""Maintains a finished data set: verifies it, removes clips on request, and removes duplicates."""
