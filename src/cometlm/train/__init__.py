"""Fine-tuning: a pretrained model learns to use its memory."""
