"""A population of adapters on one frozen base model: sampling, log-probabilities, RLOO update."""
