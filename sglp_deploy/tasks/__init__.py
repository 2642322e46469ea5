"""A model and data of its kind in, a loss, rows for CKA and a quality figure out."""
