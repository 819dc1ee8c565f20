"""``python -m care_compress``: the same as the ``care-compress`` command."""

from care_compress.cli import main

if __name__ == "__main__":
    main()
