"""One folder a method; they never import each other."""
