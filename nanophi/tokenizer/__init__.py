"""Strings -> token ids and back. Imports nothing of ours but the ground (cli, files, parallel)."""
