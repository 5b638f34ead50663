"""Searches from frame scores to tokens: greedy, beam, language-model fusion."""
