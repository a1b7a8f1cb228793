"""Benchmarks: ``python -m bench.<name> --help``, from the repository's root."""
