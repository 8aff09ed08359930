"""What the halves of the framework hand each other: types and protocols without logic."""
