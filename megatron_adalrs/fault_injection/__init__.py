"""The parts of tools/chaos.py."""
