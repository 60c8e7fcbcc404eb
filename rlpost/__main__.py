"""`python -m rlpost`, which is what `accelerate launch -m rlpost` runs."""

from rlpost.cli import main

if __name__ == "__main__":
    main()
