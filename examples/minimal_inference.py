"""Classify a video file: decode it, make one clip, run the model, print the most likely labels.

    python examples/minimal_inference.py my.mp4 --model my_vivit

For scores averaged over several clips and crops, use `vivit_hf.inference.prediction.predict_videos`.
"""

import argparse

import torch

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path


parser = argparse.ArgumentParser(description="Classify a video file.")
parser.add_argument("video", help="a video file")
parser.add_argument("--model", default=demo_model_path(), help="folder or Hub id (default: the demo model)")
arguments = parser.parse_args()

model = ViViTForVideoClassification.from_pretrained(arguments.model).eval()
processor = ViViTVideoProcessor.from_pretrained(arguments.model)

inputs = processor(arguments.video, return_tensors="pt")  # pixel_values: (1, frames, channels, height, width)
with torch.inference_mode():
    probabilities = model(**inputs).logits[0].softmax(dim=-1)  # (num_labels,)

for probability, index in zip(*probabilities.topk(min(5, len(probabilities))), strict=True):
    print(f"{probability:.3f}  {model.config.id2label[int(index)]}")
