"""
Export a classifier to ONNX, in float32 and on request in int8, as `vivit-hf export` does.

    python conversion/export_onnx.py --model DIR_OR_ID --output DIR --int8 --calibration FOLDER

Needs `pip install "vivit-hf[export]"`. The batch size is free; frames and size are the model's, and onnxruntime refuses
any other clip. The result is kept only if it computes what PyTorch computes.
"""

import sys

from vivit_hf.conversion.command import main


if __name__ == "__main__":
    sys.exit(main("export"))
