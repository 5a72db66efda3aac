"""``python -m d2v_fast`` is the same as the ``d2v-fast`` command."""

from d2v_fast.cli import main

if __name__ == "__main__":
    main()
