"""What a codec costs and saves, measured."""
