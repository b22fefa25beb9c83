"""Data files that are shipped; where each comes from is in the README beside this file."""
