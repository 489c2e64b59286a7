"""
Convert transformers' own Vivit (Model 1) to ours, and ours back, as `vivit-hf convert transformers` does.

    python conversion/convert_transformers_vivit.py --source google/vivit-b-16x2-kinetics400 --output DIR
    python conversion/convert_transformers_vivit.py --source DIR --to transformers --output OTHER_DIR

Both key layouts of transformers' files are read. The processor keeps the source's settings if it has any; otherwise it
gives values in [-1, 1]. Source and result are compared with each other.
"""

import sys

from vivit_hf.conversion.command import main


if __name__ == "__main__":
    sys.exit(main("transformers"))
