"""What commands show, made from results; only rich, pandas and words: nothing is printed here."""
