"""Evaluation and generation with a trained model in one process, without DeepSpeed."""
