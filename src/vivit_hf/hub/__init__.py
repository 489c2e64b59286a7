"""Imports that register ViViT with the Auto classes of transformers."""
