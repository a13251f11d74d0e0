"""Fine-tuning CNNs on the edge: what methods cost, which published claims hold, and which method to take.

`costs` counts one training step on fake tensors, `claims` holds the statements of arXiv 2507.23536 against
it and against finished runs, `recommend` ranks runs and chooses the method for a device.
"""
