"""Tokens + model -> weights. Imports text and model."""
