"""Checks for the exercises: each says what is off in an answer without giving the
answer away.

A check takes the reader's answer (a number, or a function they wrote), prints one line,
and returns whether the answer is right. `None` or `...` means that there is no answer
yet.
"""
