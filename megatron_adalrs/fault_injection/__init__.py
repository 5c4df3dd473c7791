"""Fault-injection campaign: kill small runs and check that nothing is lost when they resume."""
