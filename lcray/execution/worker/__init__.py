"""What one worker does with a span. This package does not use Ray."""
