"""SOAR: a language model breaks through a reasoning plateau by teaching itself (arXiv 2601.18778)."""

__version__ = "0.1.0"
