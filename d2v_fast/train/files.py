"""Files that are replaced as a whole, where the training code looks for them."""

from d2v_fast.files import replace_file

__all__ = ["replace_file"]
