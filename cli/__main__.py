"""`python -m cli` is `penumbra`, for children that must run under this very interpreter."""

from cli.main import main

if __name__ == "__main__":
    main()
