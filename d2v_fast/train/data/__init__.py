"""Data loaders: folders of audio, images or text to batches."""
