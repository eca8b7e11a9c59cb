"""Formats in which corpora lie: one reader a kind, each a generator of (name, record) in the order of the file.

A record is a dictionary of fields, an array of token ids, or a `BadRecord`.
"""
