"""Prefix-shared attention over a paged KV cache."""
