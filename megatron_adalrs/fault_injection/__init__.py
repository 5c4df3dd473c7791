"""Fault-injection campaign: kills small runs and checks that they resume without a loss."""
