"""
Convert a ViViT checkpoint of google-research/scenic (flax msgpack), as `vivit-hf convert scenic` does.

    python conversion/convert_scenic_checkpoint.py --checkpoint FILE --model vivit-b-16x2-kinetics400 --output DIR
    python conversion/convert_scenic_checkpoint.py --checkpoint FILE --model-config config.json --output DIR

The first form is for the released models, whose configurations are built in. Needs msgpack
(`pip install "vivit-hf[conversion]"`), but neither JAX nor flax. Every array of the checkpoint's model is mapped;
otherwise the conversion stops and names it. The result is loaded again and compared with a transcription of the
official model.
"""

import sys

from vivit_hf.conversion.command import main


if __name__ == "__main__":
    sys.exit(main("scenic"))
