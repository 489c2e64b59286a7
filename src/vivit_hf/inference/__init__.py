"""What a user does with a trained model: predictions, streams, timelines, scores."""
