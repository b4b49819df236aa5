"""Verifiable rewards: answers, verifiers, and the workers that run them."""
