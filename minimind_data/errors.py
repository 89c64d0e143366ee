"""The one kind of exception that is the user's business.

Everything a user can cause (a bad record, a full disk, two settings that exclude each other) is raised as `UserError` or a
subclass, and its text is one plain sentence: what is wrong, where, and what to do. The command line prints that sentence
and exits with 1. Any other exception is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Something that the user can mend; `str(error)` says what, where and how."""
