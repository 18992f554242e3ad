"""Training DeepSeek-V4: the model, differentiable; optimisers, data, the loop, and publishing what it learned."""
