"""Measures of a model. Nothing here can know which method made it."""
