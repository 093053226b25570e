"""Measurements that the documents name, each a command: `python -m examples.NAME`."""
