"""`python -m rpn_train` is `rpn-train`: what torch's launcher starts in every process."""

from rpn_train.cli import train_main

if __name__ == "__main__":
    train_main()
