"""
Make a ViViT of any variant from an image ViT, as `vivit-hf convert vit` does.

    python conversion/convert_vit_checkpoint.py --source google/vit-base-patch16-224-in21k \\
        --attention-type factorised_encoder --output DIR

Every array of the source is mapped or listed as unused with a reason; otherwise the conversion stops and names it. The
result is loaded again and compared with the ViT. Needs neither JAX nor timm.
"""

import sys

from vivit_hf.conversion.command import main


if __name__ == "__main__":
    sys.exit(main("vit"))
