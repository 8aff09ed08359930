"""Models wired from parts: how images and texts meet."""
