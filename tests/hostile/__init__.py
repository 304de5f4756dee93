"""Attacks from real containers: while they last, other instances get correct answers."""
