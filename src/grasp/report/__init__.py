"""Results into things to look at: the model card, plots."""
