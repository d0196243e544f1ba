"""Images and annotations to tensors."""
