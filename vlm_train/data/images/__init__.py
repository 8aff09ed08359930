"""Image and video bytes -> what a vision encoder is given."""
