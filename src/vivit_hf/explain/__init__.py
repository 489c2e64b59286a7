"""Where a model looked: attention rollout, gradient relevance, overlays and charts."""
