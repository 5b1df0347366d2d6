"""What is remembered on the host: records by key and their files, difficulty, reference losses, a run's saved state."""
