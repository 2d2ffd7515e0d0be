"""Checks for the exercises: each explains what is wrong, without the solution.

A check accepts the reader's answer (a number, or a function they wrote), prints one
line, and returns whether the answer is right. `None` or `...` means that there is no
answer yet.

Example:
    >>> from paperlib.exercises import mobilenet
    >>> mobilenet.standard_cost(5 * 5 * 16 * 32 * 28 * 28)
    right: kernel area × channels in × channels out × output area
    True
"""
