"""The report of an evaluation: aggregated numbers, tables, figures and the page."""
