"""Many ranks: who plans for whom, how they fail together, how they publish files."""
