"""The `openai` annotator: a language model behind any server with the Chat Completions protocol solves and marks."""
