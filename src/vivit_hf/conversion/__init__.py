"""Weights and settings of other implementations."""
