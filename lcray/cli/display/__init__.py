"""Results as tables and lines, for commands to print."""
