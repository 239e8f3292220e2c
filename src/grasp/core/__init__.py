"""Nouns and tools. Nothing in this folder knows a method."""
