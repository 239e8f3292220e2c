"""What a run is asked to do, as records whose fields are flags, keyword arguments and TOML keys."""
