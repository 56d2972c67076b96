"""Data sets of the experiments: generated, embedded or read from files."""
