"""How messages travel: `base` has the signatures, with one sibling per implementation."""
