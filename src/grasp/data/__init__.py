"""Text in, token ids out: the one road for calibration, evaluation and training."""
