"""What is read from a run folder: pages, figures, exports; torch-free."""
