"""Mixers beside softmax attention and their released formulations: ``python -m attention.bench``."""
