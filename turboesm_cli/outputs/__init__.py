"""Files that appear whole or not at all, and work that outlives its process."""
