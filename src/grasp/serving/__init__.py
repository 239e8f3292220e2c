"""Compressed models outside transformers: the vLLM plug-in, and exports to other formats."""
