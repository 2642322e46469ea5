"""Names of texts in, rows of a mix out, with some of each text kept back."""
