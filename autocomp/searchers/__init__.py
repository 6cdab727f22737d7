"""Searchers propose candidates; they hold no hidden state, so a resumed study asks them the same way."""
