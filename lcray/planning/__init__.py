"""What is chosen before the first gradient: the plan, its spans, and what they will take."""
