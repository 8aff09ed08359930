"""Raw files as users have them, read record by record."""
