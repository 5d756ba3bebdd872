"""KV memory that knows positions: layers, a Hugging Face Cache, rotation, coded storage, files, byte accounting."""
