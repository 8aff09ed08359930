"""Images and videos: their limits and headers."""
