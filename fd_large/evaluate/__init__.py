"""What a trained net is worth: nearest neighbours, a linear probe, fine-tuning."""
