"""Sources, formats and batches: from a file or Hub id to token ids with masks."""
