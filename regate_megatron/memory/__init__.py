"""What is remembered between steps, on the host: records by key, difficulty, and the state that is saved of a run."""
