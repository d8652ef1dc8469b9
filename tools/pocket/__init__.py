"""Builds what `superexperts.pocket` ships: the checkpoint, the tokenizer and the data files."""
