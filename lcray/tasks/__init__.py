"""What is analyzed: the task of a user, its model as one flat vector, its data in batches."""
