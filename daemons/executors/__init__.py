"""Programs that do a serving engine's iterations for real."""
