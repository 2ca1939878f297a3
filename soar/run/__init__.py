"""One run in its folder: stages, checkpoints, interruptions, workers."""
