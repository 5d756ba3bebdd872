"""Documents are studied once; the compressed memory of them is kept, and questions are answered from it."""
