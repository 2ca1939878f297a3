"""Before a run: will it work, and what will it cost."""
