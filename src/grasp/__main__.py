"""`python -m grasp` is the command `grasp`."""

from grasp.cli import main

if __name__ == "__main__":
    main()
