"""Compress the key/value cache of protein language models, ESM-2 and autoregressive ones, and decode from it.

The stages, in the order in which data passes through them:
sequences → model → stats → codec → bundle → cache → decode → metrics → results → figures.
"""

from importlib.metadata import version

__version__ = version("turboesm")
