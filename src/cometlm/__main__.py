"""`python -m cometlm`: the command line, where its script is not on the path."""

from cometlm.cli.main import run

if __name__ == "__main__":
    run()
