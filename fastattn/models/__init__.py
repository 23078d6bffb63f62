"""Models built on this package's attention: a Transformer for translation and a text classifier."""
