"""What tools/replay.py tells of a record."""
