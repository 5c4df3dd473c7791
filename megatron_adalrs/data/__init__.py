"""Data that training reads: tokenizers, indexed datasets, samples, blends and the batch loader."""
