"""What `bench/parallel.py` measures on each of several ranks."""
