"""Measures prepare against video2dataset and Ray Data on the same rows, frames and cores."""
