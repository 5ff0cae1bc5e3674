"""The search for the fastest launches on the GPU at hand."""
