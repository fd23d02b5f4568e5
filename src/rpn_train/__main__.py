"""The commands as `python -m rpn_train [train | eval | propose]`; train where none is named.

It is what torch's launcher starts in every process.
"""

import sys

from rpn_train.cli import train_main
from rpn_train.cli_trained import eval_main, propose_main

COMMANDS = {"train": train_main, "eval": eval_main, "propose": propose_main}

if __name__ == "__main__":
    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "train"
    COMMANDS[name]()
