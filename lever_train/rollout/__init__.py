"""Rollouts: propose candidates, have them answered, score the answers."""
