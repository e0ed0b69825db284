"""Three-dimensional images: reading any of the field's formats, their geometry, and writing results back."""
