"""What several families, towers and language models are built from."""
