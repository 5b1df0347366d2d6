"""One thin module per host framework."""
