"""From an image ViT to a ViViT, and the sizes and costs of a model."""
