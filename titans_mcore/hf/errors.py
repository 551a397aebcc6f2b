"""How an export ends when it cannot be done."""


class ExportError(Exception):
    """A fault the user can mend. Its message is one sentence: the thing, what came, and what to do."""


class ProofFailed(Exception):
    """The exported model does not compute what the trained one computes; nothing was written."""
