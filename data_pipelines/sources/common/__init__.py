"""What sources share: reading raw files, and making questions, conversations, regions and pictures into samples."""
