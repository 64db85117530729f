"""Controls that move the latents by gradients."""
