"""Statistics + a recipe → how keys and values are coded."""
