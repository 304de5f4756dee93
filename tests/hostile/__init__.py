"""Guests that do harm on purpose, from real containers: whatever they do, others are answered as if nothing was."""
