"""What is behind the integrations with other libraries: replacing their attributes, and undoing it."""
