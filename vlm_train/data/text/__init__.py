"""From turns to token streams."""
