"""The verbs: one file each, by its name. Read compress.py first: it is the paper, top to bottom."""
