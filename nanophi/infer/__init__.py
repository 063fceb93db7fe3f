"""Weights -> text. Imports text and model."""
