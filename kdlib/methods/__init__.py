"""How a student learns: one file per idea."""

from kdlib.methods.distill import KD, CrossEntropy, Method

__all__ = ["KD", "CrossEntropy", "Method"]
