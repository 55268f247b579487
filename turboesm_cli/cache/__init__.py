"""Key/value caches, in memory and on disk."""
