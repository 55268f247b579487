"""Files of sequences → proteins."""
