"""Other libraries' words: their bars and notices stay out of ours."""

from __future__ import annotations

import logging

import transformers


def only_our_own_words() -> None:
    """Let grasp report what it does, and keep bars and notices of others out of ours."""
    logging.getLogger("grasp").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints for itself
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
