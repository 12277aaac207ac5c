"""Opens a ViT or CLIP, an adapter on it and the merged model with transformers and peft, and compares embeddings and logits.

    python interop_vision.py BASE ADAPTER MERGED [EMBEDDINGS] ADAPTED    files of `lowrank embed` of BASE, without and with ADAPTER
"""
import json
import sys

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import CLIPForImageClassification, CLIPImageProcessorPil, ViTForImageClassification, ViTImageProcessorPil
from transformers.image_utils import load_image

base, adapter, merged, *embeddings, adapted = sys.argv[1:]
is_clip = json.load(open(f"{base}/config.json"))["model_type"] == "clip"
kind, processor = (CLIPForImageClassification, CLIPImageProcessorPil) if is_clip else (ViTForImageClassification, ViTImageProcessorPil)


def read(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["images"]), file.get_tensor("embeddings")


def embed(model, pixels):
    """The input of the classifier: the mean of the patches of a CLIP, the class token of a ViT."""
    with torch.no_grad():
        if is_clip:
            return model.vision_model(pixels).last_hidden_state[:, 1:].mean(1)
        return model.vit(pixels).last_hidden_state[:, 0]


names, ours = read(adapted)
pixels = processor.from_pretrained(base)([load_image(name) for name in names], return_tensors="pt")["pixel_values"]
for path in embeddings:
    difference = (embed(kind.from_pretrained(base).eval(), pixels) - read(path)[1]).abs().max().item()
    assert difference < 1e-4, f"embeddings differ by {difference}"

# A new classifier has other classes than the model's own.
labels = json.load(open(f"{adapter}/labels.json"))
model = kind.from_pretrained(base, num_labels=len(labels), ignore_mismatched_sizes=True).eval()
tuned = PeftModel.from_pretrained(model, adapter).eval()
difference = (embed(tuned.base_model.model, pixels) - ours).abs().max().item()
assert difference < 1e-4, f"adapted embeddings differ by {difference}"
whole = kind.from_pretrained(merged).eval()
assert [whole.config.id2label[number] for number in range(len(labels))] == labels
with torch.no_grad():
    difference = (whole(pixel_values=pixels).logits - tuned(pixel_values=pixels).logits).abs().max().item()
assert difference < 1e-4, f"merged logits differ by {difference}"
print(f"{len(names)} images, merged within {difference:.1e}")
