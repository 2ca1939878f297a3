"""Problems, their golds and everything that turns text into a verdict; torch-free."""
