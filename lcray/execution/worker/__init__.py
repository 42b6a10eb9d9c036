"""What one worker does with a span; knows nothing of Ray."""
