"""The run itself: what is trained, with what, and in which order."""
