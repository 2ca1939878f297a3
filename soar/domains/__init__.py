"""Kinds of problems with their own prompts and verifiers; torch-free."""
