"""What tuning has found: the files that keep it, and the launches that take it."""
