"""Many ranks: who plans for whom, how they fail together, how microbatches travel, how they publish files."""
