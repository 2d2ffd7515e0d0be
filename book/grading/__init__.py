"""Grade submitted notebooks: `python book/grading grade FOLDER`; the checks themselves
are in paperlib.exercises.
"""
