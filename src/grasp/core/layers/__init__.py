"""The modules that a checkpoint carries, and how transformers loads them."""
