"""One training step: the planner and its plan, the session that runs it, what is counted."""
