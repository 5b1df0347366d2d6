"""What is remembered between steps, on the host: records by key, difficulty, the files they are saved in."""
