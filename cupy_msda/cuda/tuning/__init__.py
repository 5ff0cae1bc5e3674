"""What tuning has found: its vocabulary, its files, and how it takes the place of entries of a launch table."""
