"""Measures prepare beside video2dataset and Ray Data: same rows, same frames, same cores, one run."""
