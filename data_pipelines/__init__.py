"""The model-free half of the data: raw formats -> typed Samples -> WebDataset shards and back."""
