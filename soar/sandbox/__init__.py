"""Programs written by models run here, behind walls; nothing else does."""
