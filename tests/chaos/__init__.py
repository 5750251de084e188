"""Programmes that try to break a promise: random, seeded, and judged by a model of a few lines."""
