"""What a run is asked to do, as records: flags, keywords and TOML keys are read off them."""
