"""A preference study: raters compare clips of two systems; build, serve, store votes, tally (Section 4.3, Table 4)."""
