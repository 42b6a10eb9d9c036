"""The subject of an analysis: a user's task, its model as one flat vector, its data in batches."""
