"""Protocols: which clips an evaluation takes, and the other systems it compares."""
