"""What stands behind the drop-ins for other libraries: replacing attributes, and undoing it."""
