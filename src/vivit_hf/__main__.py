"""`python -m vivit_hf` is `vivit-hf`."""

from .cli.app import main


if __name__ == "__main__":
    main()
