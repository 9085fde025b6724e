"""A question before files are written or removed."""


def agreed(question: str) -> bool:
    """Ask; where nobody can answer, the answer is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print("nobody can answer here; --yes answers")
        return False
