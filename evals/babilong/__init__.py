"""BABILong: questions about a few facts that lie scattered in a long text, streamed through the model in pieces."""
