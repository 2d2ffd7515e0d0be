"""What every check prints, in one place."""


def unanswered(answer) -> bool:
    """Tell whether there is no answer yet, and say so."""
    if answer is None or answer is ...:
        print("no answer yet: put yours in place of the dots and run the cell again")
        return True
    return False


def right(explanation: str) -> bool:
    """Accept an answer and say why it is right."""
    print(f"right: {explanation}")
    return True


def wrong(hint: str) -> bool:
    """Turn an answer down with a hint."""
    print(f"not yet: {hint}")
    return False
