"""Recipes that have between them whatever a cache and a forward pass see of a codec.

For tests that ask how codes are kept and read, not what a recipe is: flat and waterfill have no part of their own.
"""

UNLIKE = ("paper", "auto", "auto-coded", "turboquant")
