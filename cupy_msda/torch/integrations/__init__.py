"""What is behind the integrations with other libraries: finding their functions, exchanging them, and undoing it."""
