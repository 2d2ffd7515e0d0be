"""Checks for the exercises: each explains what is wrong, without the solution.

A check accepts the reader's answer (a number, or a function they wrote), prints one
line, and returns whether the answer is right. `None` or `...` means that there is no
answer yet.
"""
