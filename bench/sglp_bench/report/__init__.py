"""A run folder's files in, ``report.json`` and one page to read out."""
