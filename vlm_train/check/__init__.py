"""Every problem of a configuration, found before a weight is read."""
