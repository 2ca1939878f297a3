"""What computes for the loop: this process, or a training service."""
